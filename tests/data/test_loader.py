"""A stream depends on nothing but its pipeline and seed, and resumes where it was."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import grain
import jax
import numpy as np
import pytest

from jaxformer.data.augment import Affine
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline, eval_batches, fingerprint, to_mesh, train_batches
from jaxformer.data.mix import Mixup
from jaxformer.data.shards import ArrayRecord
from jaxformer.data.sources import Digits
from jaxformer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Image i is full of i, so that a batch shows which records it holds."""

    count: int = 23
    num_classes: int = 5

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((4, 4, 1), index, np.float32)
        return {"image": image, "label": index % 5, "source": f"number {index}"}


@dataclasses.dataclass(frozen=True)
class Noise:
    def __call__(self, record, rng):
        return record | {"noise": rng.random(3, dtype=np.float32)}


@dataclasses.dataclass(frozen=True)
class Refuse:
    index: int

    def __call__(self, record):
        if record["image"][0, 0, 0] == self.index:
            raise InputError(f"{record['source']}: is bad; remove it")
        return record


PIPELINE = Pipeline(Numbers(), (Noise(), Affine(0.3, 5, 0.1)), (Mixup(0.5, 5),))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def seen(batches):
    """The numbers in batches of `Numbers`."""
    return np.concatenate([b["image"][:, 0, 0, 0] for b in batches]).astype(int).tolist()


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def train(pipeline=PIPELINE, batch_size=6, seed=3, **where):
    return train_batches(pipeline, batch_size=batch_size, seed=seed, **where)


def test_a_batch_is_what_the_model_expects():
    (batch,) = take(train(), 1)
    kinds = {name: (x.shape, x.dtype.name) for name, x in batch.items()}
    assert kinds == {
        "image": ((6, 4, 4, 1), "float32"),
        "label": ((6,), "int32"),
        "noise": ((6, 3), "float32"),
        "target": ((6, 5), "float32"),
    }


def test_the_stream_depends_on_the_seed_alone():
    assert_same(take(train(), 9), take(train(), 9))
    a, b = (take(train(seed=s), 40) for s in (3, 4))
    assert not np.array_equal(a[0]["noise"], b[0]["noise"])
    plain = Pipeline(Numbers())
    epochs = [seen(take(train(plain, 23, seed), 4)) for seed in (3, 4)]
    orders = {tuple(e[i : i + 23]) for e in epochs for i in range(0, 92, 23)}
    assert len(orders) == 8  # no seed is another seed an epoch later.


def test_every_epoch_has_every_record_once():
    numbers = seen(take(train(Pipeline(Numbers()), 6), 23))
    for epoch in range(6):
        assert sorted(numbers[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_augmentation_changes_with_the_epoch():
    noise = np.concatenate([b["noise"] for b in take(train(), 20)])
    assert len(np.unique(noise, axis=0)) == 120


@pytest.mark.parametrize("count", [2, 3])
def test_the_rows_of_all_processes_are_the_rows_of_one(count):
    unmixed = dataclasses.replace(PIPELINE, batch_transforms=())
    alone = take(train(unmixed), 8)
    parts = [
        take(train(unmixed, process_index=i, process_count=count), 8) for i in range(count)
    ]
    joined = [
        {name: np.concatenate([p[name] for p in part]) for name in part[0]}
        for part in zip(*parts, strict=True)
    ]
    assert_same(joined, alone)


def test_all_processes_mix_alike():
    weights = [
        {round(float(b["target"].max()), 4) for b in take(train(process_index=i, **two), 1)}
        for i, two in ((0, {"process_count": 2}), (1, {"process_count": 2}), (0, {}))
    ]
    numbers = Pipeline(Numbers(), (), (Mixup(0.5, 5),))
    alone, halves = take(train(numbers), 5), []
    for i in range(2):
        halves.append(take(train(numbers, process_index=i, process_count=2), 5))
    for whole, *parts in zip(alone, *halves, strict=True):
        for i, part in enumerate(parts):  # all but each share's first row.
            rows = slice(3 * i + 1, 3 * i + 3)
            np.testing.assert_array_equal(part["image"][1:], whole["image"][rows])
            np.testing.assert_array_equal(part["target"][1:], whole["target"][rows])
    assert len(weights) == 3


@pytest.mark.parametrize("step", [0, 1, 3, 4, 11])
def test_resume_is_exact(step):
    wanted = take(train(), 14)
    first = train()
    assert_same(take(first, step), wanted[:step])
    time.sleep(0.02)  # let it read ahead.
    state = json.loads(json.dumps(first.get_state()))
    assert len(json.dumps(state)) < 20
    again = train()
    again.set_state(state)
    assert_same(take(again, 14 - step), wanted[step:])
    again.set_state(state)  # also on one that is already open.
    assert again.get_state() == state
    assert_same(take(again, 2), wanted[step : step + 2])


def test_grain_can_checkpoint_it():
    iterator = train()
    take(iterator, 3)
    assert isinstance(iterator, grain.DatasetIterator)
    handler = grain.checkpoint.CheckpointSave(iterator)
    assert handler.item.get_state() == {"step": 3}


def test_closed_is_closed():
    iterator = train()
    take(iterator, 1)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.slow
def test_workers_change_nothing_and_leave_nothing_behind():
    wanted = take(train(), 7)
    pipeline = dataclasses.replace(PIPELINE, workers=2)
    iterator = train(pipeline)
    assert_same(take(iterator, 3), wanted[:3])
    state = iterator.get_state()
    assert state == {"step": 3}
    iterator.set_state(state)
    assert_same(take(iterator, 4), wanted[3:])
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    iterator.close()
    assert not multiprocessing.active_children()
    assert not any(w.is_alive() for w in workers)
    evaluation = Pipeline(Numbers(), (), (), workers=2)
    assert_same(
        list(eval_batches(evaluation, batch_size=6)),
        list(eval_batches(Pipeline(Numbers()), batch_size=6)),
    )
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_arrives_as_it_was_raised(workers):
    for iterator in (
        train(Pipeline(Numbers(), (Refuse(7),), workers=workers)),
        eval_batches(Pipeline(Numbers(), (Refuse(7),), workers=workers), batch_size=4),
    ):
        with pytest.raises(InputError) as caught:
            take(iterator, 5)
        assert str(caught.value) == "number 7: is bad; remove it"
        iterator.close()


def test_an_error_is_not_stepped_over():
    wanted = seen(take(train(Pipeline(Numbers()), 1), 30))
    iterator = train(Pipeline(Numbers(), (Refuse(7),)), 1)
    take(iterator, wanted.index(7))
    for _ in range(2):
        with pytest.raises(InputError, match="number 7: is bad"):
            next(iterator)
    assert iterator.get_state() == {"step": wanted.index(7)}


PROGRAM = """
import multiprocessing, os, signal, sys

from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline, train_batches
from jaxformer.data.sources import Digits

if __name__ == "__main__":
    pipeline = Pipeline(Digits(), (Normalize(),), workers=2)
    iterator = train_batches(pipeline, batch_size=8, seed=0)
    next(iterator), next(iterator)  # one of each worker.
    print(*(w.pid for w in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["normal", "killed"])
def test_workers_end_with_their_parent(tmp_path, end):
    (tmp_path / "program.py").write_text(PROGRAM)
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), end],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    with run.stdout:
        workers = run.stdout.readline().split()
    code = run.wait(60)
    assert len(workers) == 2
    assert code == (0 if end == "normal" else -signal.SIGKILL)
    deadline = time.time() + 20
    while alive := [pid for pid in workers if running(int(pid))]:
        assert time.time() < deadline, f"{alive} outlived their parent"
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("records", [1, 5, 6, 7, 23])
def test_evaluation_sees_every_record_once(records, count):
    source = Numbers(records)
    parts = [
        list(eval_batches(Pipeline(source), batch_size=6, process_index=i, process_count=count))
        for i in range(count)
    ]
    assert {len(part) for part in parts} == {-(-records // 6)}
    real = []
    for batch in (b for part in parts for b in part):
        assert batch["image"].shape == (6 // count, 4, 4, 1)
        assert batch["weight"].dtype == np.float32 and batch["label"].dtype == np.int32
        padding = batch["weight"] == 0
        assert set(batch["weight"].tolist()) <= {0.0, 1.0}
        assert not batch["image"][padding].any() and not batch["label"][padding].any()
        real += batch["image"][~padding, 0, 0, 0].tolist()
    assert sorted(real) == list(range(records))


def test_evaluation_is_in_order_and_deterministic_only():
    assert seen(eval_batches(Pipeline(Numbers(6)), batch_size=3)) == list(range(6))
    for pipeline in (
        Pipeline(Numbers(), (Noise(),)),
        Pipeline(Numbers(), (), (Mixup(1.0, 5),)),
    ):
        with pytest.raises(InputError, match="evaluation has no random or batch transforms"):
            eval_batches(pipeline, batch_size=6)


def test_padding_is_zero_after_the_transforms_too():
    (batch,) = eval_batches(Pipeline(Numbers(1), (Normalize(5.0),)), batch_size=2)
    assert batch["image"][0].max() == -5 and not batch["image"][1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch_size": 7, "process_count": 2},
            "batch_size=7 must be a positive multiple of the 2",
        ),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must be from 0 to 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"pipeline": Pipeline(Numbers(0))}, "Numbers.*: holds no record; add some"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        train(**change)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda r: r | {"image": b"..."},
            "number .*: a batch holds float32 .* this one is enc",
        ),
        (lambda r: r | {"image": r["image"].astype(np.uint8)}, r"this one is uint8; begin the"),
        (
            lambda r: r | {"image": r["image"][: 1 + int(r["image"].max()) % 2]},
            r"its shape \[.*\] is not that of number .*; put Resize and CenterCrop",
        ),
    ],
)
def test_images_that_make_no_batch_are_named(transform, message):
    with pytest.raises(InputError, match=message):
        next(train(Pipeline(Numbers(), (transform,))))


def test_to_mesh_splits_the_rows():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    (batch,) = take(train(batch_size=16), 1)
    arrays = to_mesh(batch, sharding)
    assert_same([jax.device_get(arrays)], [batch])
    for array in arrays.values():
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        assert array.addressable_shards[0].data.shape[0] == 2


def test_fingerprint_covers_what_decides_the_stream():
    def of(pipeline=PIPELINE, batch_size=6, seed=3):
        return fingerprint(pipeline, batch_size, seed)

    assert of() == "91a82aedee6aecb3"  # on every machine, in every process.
    assert of(dataclasses.replace(PIPELINE, workers=4)) == of()
    assert (
        of(dataclasses.replace(PIPELINE, transforms=(Noise(), Affine(0.3, 5.0, 0.1)))) == of()
    )
    by_channel = Pipeline(Numbers(), (Normalize((0.5, 1.0)),))
    arrays = Pipeline(Numbers(), (Normalize(tuple(np.float64([0.5, 1.0]))),))
    assert of(by_channel) == of(arrays) != of(Pipeline(Numbers(), (Normalize((0.5, 1.1)),)))
    others = [
        of(batch_size=7),
        of(seed=4),
        of(dataclasses.replace(PIPELINE, source=Numbers(22))),
        of(dataclasses.replace(PIPELINE, source=Digits())),
        of(dataclasses.replace(PIPELINE, transforms=(Noise(), Affine(0.3, 5, 0.2)))),
        of(dataclasses.replace(PIPELINE, transforms=PIPELINE.transforms[::-1])),
        of(dataclasses.replace(PIPELINE, batch_transforms=())),
    ]
    assert len({of(), *others}) == 8


def test_a_source_in_many_files_streams(tmp_path):
    from jaxformer.data.shards import write_array_record

    for part in range(3):
        records = [Numbers()[i] for i in range(part * 4, part * 4 + 4)]
        write_array_record(str(tmp_path / f"{part}.array_record"), records)
    source = ArrayRecord(str(tmp_path / "*.array_record"), num_classes=5)
    assert sorted(seen(take(train(Pipeline(source), 4), 3))) == list(range(12))
