"""The program whole, on a model so small that a run takes seconds."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evaluate.__main__ import main as evaluate_main
from evaluate.run import batches, evaluate_checkpoint
from jaxformer import checkpoint, convert
from jaxformer.data.loader import Pipeline, to_mesh, train_batches
from jaxformer.data.sources import Digits
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.metrics import Mean
from train import report
from train.faults.processes import CONFIG, TINY
from train.goodput import total
from train.run import Diverged, prepare, train
from train.spoiled import Spikes


def experiment(*overrides, one=True):
    return load(CONFIG, [*TINY, *(["mesh=data=1"] if one else []), *overrides])


def run(workdir, *overrides, devices=1):
    return train(experiment(*overrides, one=False), workdir, devices=jax.devices()[:devices])


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return np.array([r["loss"] for r in rows(workdir) if "loss" in r])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 steps on one device, and its final state."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(workdir)


def test_a_run_leaves_everything_a_reader_needs(finished):
    workdir, state = finished
    assert int(state.step) == 20
    made = rows(workdir)
    assert [r["step"] for r in made if "loss" in r] == list(range(1, 21))
    assert losses(workdir)[-5:].mean() < losses(workdir)[:5].mean()
    told = {"grad_norm", "learning_rate", "accuracy", "examples_per_second", "seconds/cpu"}
    assert told < set(made[0])
    assert [r["step"] for r in made if "eval/test/top1" in r] == [10, 20]
    config = json.loads((workdir / "config.json").read_text())
    assert config["experiment"]["model"]["depth"] == 2 and config["versions"]["jax"]
    assert checkpoint.steps(workdir / "checkpoints") == [10, 20]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events*"))


def test_a_run_says_where_its_time_went(finished, capsys):
    spent = total(finished[0] / "metrics.jsonl")
    assert set(spent) == {"steps", "compile", "input", "evaluation", "save", "lost"}
    assert min(spent["steps"], spent["compile"], spent["save"]) > 0 and spent["lost"] == 0
    assert report.main([str(finished[0])]) == 0
    assert "goodput" in capsys.readouterr().out
    assert report.main([str(finished[0] / "checkpoints")]) == 2


def test_a_run_that_is_done_stays_as_it_is(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "done")
    chex.assert_trees_all_equal(run(workdir), finished[1])


@dataclasses.dataclass(frozen=True)
class Judge:
    """A task that fails until a file is there, and counts how often it ran to its end."""

    ready: pathlib.Path

    def run(self, trained):
        number = int(self.ready.read_text()) + 1
        self.ready.write_text(str(number))
        return {"number": Mean(np.float64(number), np.int64(1))}


def test_tasks_that_a_kill_left_out_run_at_the_next_start(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "killed")
    ready = tmp_path / "ready"
    made = dataclasses.replace(experiment(one=False), tasks={"judge": Judge(ready)})
    with pytest.raises(FileNotFoundError):
        train(made, workdir, devices=jax.devices()[:1])
    ready.write_text("0")
    for _ in range(2):
        train(made, workdir, devices=jax.devices()[:1])
    assert [
        row["eval/judge/number"] for row in rows(workdir) if "eval/judge/number" in row
    ] == [1]


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "killed")
    shutil.rmtree(workdir / "checkpoints" / "20")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.1}\n{"step": 2')  # As a kill leaves it.
    chex.assert_trees_all_equal(run(workdir), finished[1])
    assert [r["step"] for r in rows(workdir) if "loss" in r] == list(range(1, 21))
    np.testing.assert_array_equal(losses(workdir), losses(finished[0]))


MIXED = "data=2,fsdp=2,tensor=2"
MESHES = [
    MIXED,
    *(pytest.param(m, marks=pytest.mark.slow) for m in ("data=8", "fsdp=8", "fsdp=4,tensor=2")),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_losses_and_holds_its_share(mesh, finished, tmp_path):
    state = run(tmp_path, f"mesh={mesh}", devices=8)
    apart = np.abs(losses(tmp_path) / losses(finished[0]) - 1).max()
    print(f"\n{mesh}: losses of 20 steps differ by {apart:.1e} at most")
    assert apart < 1e-5

    def bytes_a_device(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    ways = 8 if "data" not in mesh else {"data=8": 1}.get(mesh, 4)
    for tree, whole in zip(
        (state.params, state.opt_state),
        (finished[1].params, finished[1].opt_state),
        strict=True,
    ):
        share = bytes_a_device(tree) / bytes_a_device(whole)
        print(f"{mesh}: {bytes_a_device(tree):,} bytes a device, {share:.3f} of the whole")
        assert share < 1.25 / ways


def test_resumes_on_another_mesh(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "moved")
    shutil.rmtree(workdir / "checkpoints" / "20")
    run(workdir, f"mesh={MIXED}", devices=8)
    np.testing.assert_allclose(losses(workdir), losses(finished[0]), rtol=1e-5)


def test_accumulation_takes_the_same_steps(finished, tmp_path):
    run(tmp_path, "accumulate=2")
    np.testing.assert_allclose(losses(tmp_path), losses(finished[0]), rtol=1e-4)


def counts(found):
    return {
        f"{name}/{metric}": (np.asarray(m.sum).tolist(), np.asarray(m.count).tolist())
        for name, group in found.items()
        for metric, m in group.items()
        if np.issubdtype(np.asarray(m.sum).dtype, np.integer)
    }


@pytest.mark.parametrize("devices", [3, 8])
def test_evaluation_counts_are_equal_integers_on_any_number_of_devices(devices, finished):
    small = experiment("eval_batch_size=7")
    _, one = evaluate_checkpoint(small, finished[0], devices=jax.devices()[:1])
    sizes = ("eval_batch_size=50", "batch_size=128")  # The latter is of no matter here.
    other = experiment(*sizes, f"mesh=data={devices}", one=False)
    step, found = evaluate_checkpoint(other, finished[0], devices=jax.devices()[:devices])
    assert step == 20 and counts(found) == counts(one)
    assert counts(found)["test/top1"][1] == 360, "which neither 7 nor 51 divides"
    for metric in ("loss", "calibration"):
        a, b = (f["test"][metric].value() for f in (found, one))
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_evaluation_is_what_the_run_wrote(finished):
    _, found = evaluate_checkpoint(experiment(), finished[0], devices=jax.devices()[:1])
    (last,) = [r for r in rows(finished[0]) if r["step"] == 20 and "eval/test/top1" in r]
    assert found["test"]["top1"].value() == last["eval/test/top1"]


def test_a_run_is_exported_as_the_hub_has_it(finished, tmp_path):
    out = tmp_path / "hub"
    named = [str(CONFIG), *TINY, "mesh=data=8", "--checkpoint", str(finished[0])]
    assert evaluate_main([*named, "--export", str(out)]) == 0
    model, params = convert.load(out)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    ours = {"params": finished[1].ema}
    expected = jax.jit(experiment().model.apply)(ours, images)
    chex.assert_trees_all_close(jax.jit(model.apply)({"params": params}, images), expected)


def test_a_run_is_a_file_that_needs_only_jax(finished, tmp_path):
    out = tmp_path / "model.stablehlo"
    named = [str(CONFIG), *TINY, "mesh=data=8", "--checkpoint", str(finished[0])]
    assert evaluate_main([*named, "--stablehlo", str(out), "eval_batch_size=3"]) == 0
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    held = jax.export.deserialize(bytearray(out.read_bytes()))
    assert held.platforms == ("cpu", "tpu") and held.in_avals[0].shape == images.shape
    ours = {"params": finished[1].ema}
    expected = jax.jit(experiment().model.apply)(ours, images)
    chex.assert_trees_all_close(jax.jit(held.call)(images), expected, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path):
    """The rate rises from 0, so that the first step is good and then all overflows."""
    wild = ("optimizer.rate.warmup=20", "optimizer.rate.peak=1e30", "keep.every=1")
    said = r"step (\d+): .* is (nan|inf|not finite); the checkpoint of step (\d+) is whole: "
    with pytest.raises(Diverged, match=said) as error:
        run(tmp_path, *wild)
    step, _, saved = re.search(said, str(error.value)).groups()
    assert int(saved) < int(step) and rows(tmp_path)[-1]["step"] == int(step)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == int(saved)
    _, found = evaluate_checkpoint(experiment(*wild), tmp_path, devices=jax.devices()[:1])
    assert found["test"]["top1"].count == 360


def test_skipping_leaves_such_steps_out(tmp_path):
    state = run(tmp_path, "optimizer.rate.peak=1e30", "nonfinite=skip", "steps=6")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    steps = [r for r in rows(tmp_path) if "loss" in r]
    left_out = np.cumsum([0, *(r["skipped"] for r in steps)])
    assert left_out[-1] >= 3
    counted = optax.tree.get_all_with_path(state.opt_state, "count")
    assert {int(count) for _, count in counted} == {6 - left_out[-1]}
    rate = experiment("optimizer.rate.peak=1e30").optimizer.rate.make(6)
    used = [float(rate(i - left_out[i])) for i in range(6)]  # By what the optimizer counts.
    np.testing.assert_allclose([r["learning_rate"] for r in steps], used, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """Digits of which one, the first of batch number `batch`, is not a number."""

    batch: int
    num_classes: int = 10

    def __len__(self):
        return len(DIGITS)

    def __getitem__(self, index):
        order, *_ = np.random.SeedSequence(0).generate_state(3)  # As `train_batches` has it.
        places = grain.MapDataset.range(len(self)).shuffle(int(order))
        record = DIGITS[index]
        bad = index == places[24 * self.batch]
        return record | {"image": record["image"] * np.float32("nan" if bad else 1)}


DIGITS = Digits("train")


def test_going_back_leaves_batches_out(tmp_path, capsys):
    """Step 5 is spoiled, seen after step 6 was sent off, and 3 to 5 are left out, from 0.

    So they are by a run that is killed after it went back, and started again.
    """
    made = experiment("nonfinite=back", "keep.every=3", "steps=8", "eval_every=100", "evals={}",
                      "keep.best=0", "keep.last=3")  # fmt: skip
    made = dataclasses.replace(made, data=Pipeline(Spoilt(4), made.data.transforms))
    state = train(made, tmp_path / "run", devices=jax.devices()[:1])
    said = capsys.readouterr().out
    assert (
        "warning: step 5: loss is nan; back to the checkpoint of step 3, and the 3 batches "
        "read since are left out" in said
    )
    assert [r["step"] for r in rows(tmp_path / "run") if "loss" in r] == list(range(1, 9))
    (told,) = (r for r in rows(tmp_path / "run") if "back/from" in r)
    assert (told["step"], told["back/from"], told["back/batches"]) == (3, 5, 3)
    assert total(tmp_path / "run" / "metrics.jsonl")["lost"] > 0

    on = prepare(made, jax.devices()[:1])
    with contextlib.closing(train_batches(made.data, batch_size=24, seed=0)) as data:
        batches = [to_mesh(next(data), on.batch) for _ in range(11)]
    key = jax.random.key(0)
    expected = on.init(key)
    for number in (0, 1, 2, 6, 7, 8, 9, 10):
        expected, _ = on.step(expected, batches[number], key)
    chex.assert_trees_all_equal(state, expected)

    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    state = train(made, tmp_path / "run", devices=jax.devices()[:1])
    assert "back to" not in (said := capsys.readouterr().out) and "resuming at step 3" in said
    chex.assert_trees_all_equal(state, expected)


@pytest.mark.slow
def test_who_goes_back_in_vain_stops(tmp_path, capsys):
    """Parameters of 1e30 are finite, and step 2 is saved: the one before is tried, too."""
    wild = ("optimizer.rate.warmup=20", "optimizer.rate.peak=1e30", "keep.every=1")
    with pytest.raises(Diverged, match="the checkpoint of step 2 is whole"):
        run(tmp_path, *wild, "nonfinite=back")
    assert [r["step"] for r in rows(tmp_path) if "back/from" in r] == [1, 1, 1]
    assert (
        "going back to step 2 was in vain 3 times; it is set aside" in capsys.readouterr().out
    )
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir(), "nothing that was saved is lost"


def test_a_spike_is_far_above_what_is_usual():
    spikes = Spikes(3.0)
    assert [spikes.seen(9.0 if i == 2 else 1.0) for i in range(8)] == [None] * 8
    assert spikes.seen(3.0) is None and spikes.seen(float("nan")) is None
    told = "loss is 3.01, more than spike=3 times 1, the median of the 9 before"
    assert spikes.seen(3.01) == told
    assert spikes.seen(3.01), "a spike is not usual"
    assert Spikes(None).seen(1e9) is None
    assert [spikes.seen(9.0, stage=1.0) for _ in range(8)] == [None] * 8, "a stage begins"
    assert "times 9, the median of the 8" in str(spikes.seen(28.0, stage=1.0))
    below = Spikes(3.0)  # Multiples of what is below 0 tell nothing.
    assert [below.seen(-2.0 + i / 100) for i in range(12)] == [None] * 12
    with pytest.raises(InputError, match="too late to skip"):
        experiment("spike=3.0", "nonfinite=skip")


def test_qk_clip_bounds_the_logits_of_a_run(finished, tmp_path):
    images = jnp.asarray(next(iter(batches(experiment().evals["test"], 360, 1)))["image"])
    model = experiment().model

    @jax.jit
    def logits(params):
        return model.apply({"params": params}, images, mutable=["stats"])[1]

    def largest(state):
        return max(float(x.max()) for x in jax.tree.leaves(logits(state.params)))

    clipped = run(tmp_path, "optimizer.qk_clip=0.01")
    assert largest(clipped) < 0.05 < largest(finished[1])


def test_a_profile_is_written(tmp_path):
    train(experiment(one=False), tmp_path, profile=(2, 4), devices=jax.devices()[:1])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
