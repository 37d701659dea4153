import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer import checkpoint
from jaxformer.data.loader import Pipeline, train_batches
from jaxformer.data.sources import Digits
from jaxformer.errors import InputError
from jaxformer.sharding import make_mesh
from jaxformer.steps import init_state


def batches():
    return train_batches(Pipeline(Digits("test")), batch_size=8, seed=0)


def make_state(key, width=256):
    params = {"a": {"kernel": jax.random.normal(key, (width, 64))}, "b": {"bias": jnp.ones(3)}}
    tx = optax.adamw(1e-3)
    return {"state": init_state(params, tx, ema=True), "key": jax.random.key_data(key)}


def shapes(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 to 3, and the tree that was saved as step 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    manager = checkpoint.open_manager(folder, last=3, best=0)
    data = batches()
    for step in (1, 2, 3):
        tree = make_state(jax.random.key(step))
        next(data)
        checkpoint.save(manager, step, tree, data, {"model": {"depth": step}}, {"top1": 0.5})
    manager.close()
    return folder, tree


def copied(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def test_comes_back_bitwise_with_the_data_position(saved):
    folder, tree = saved
    data = batches()
    found = checkpoint.restore(folder, 3, shapes(tree), data)
    chex.assert_trees_all_equal(found, tree)
    ahead = batches()
    for _ in range(3):
        next(ahead)
    np.testing.assert_array_equal(next(data)["image"], next(ahead)["image"])
    assert checkpoint.read_experiment(folder, 3) == {"model": {"depth": 3}}
    assert checkpoint.steps(folder) == [1, 2, 3]


def test_comes_back_on_another_mesh(saved):
    folder, tree = saved
    mesh = make_mesh("fsdp=4,tensor=2")

    def place(x):
        spec = jax.P("fsdp") if x.ndim == 2 else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    found = checkpoint.restore(folder, 3, jax.tree.map(place, tree))
    kernel = found["state"].params["a"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (64, 64)
    chex.assert_trees_all_equal(found, tree)


def test_a_part_comes_back_alone(saved):
    folder, tree = saved
    target = {"state": {"ema": shapes(tree)["state"].ema}}
    found = checkpoint.restore(folder, 3, target, part=True)
    chex.assert_trees_all_equal(found["state"]["ema"], tree["state"].ema)


def test_keeps_the_last_and_the_best(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "c", last=2, best=1, metric="top1")
    data = batches()
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1):
        checkpoint.save(manager, step, {"x": jnp.ones(2)}, data, {}, {"top1": score})
    manager.close()
    assert checkpoint.steps(tmp_path / "c") == [2, 4, 5]
    manager = checkpoint.open_manager(tmp_path / "c", last=2, best=1, metric="top1")
    for step, score in enumerate([0.3, 0.5, None], start=6):
        scores = {} if score is None else {"top1": score}
        checkpoint.save(manager, step, {"x": jnp.ones(2)}, data, {}, scores)
    manager.close()
    assert checkpoint.steps(tmp_path / "c") == [2, 7, 8], "also after a restart"


def test_the_best_can_be_the_least(tmp_path):
    manager = checkpoint.open_manager(tmp_path / "c", last=1, best=1, metric="-loss")
    for step, score in enumerate([0.4, 0.1, 0.3], start=1):
        checkpoint.save(manager, step, {"x": jnp.ones(2)}, batches(), {}, {"loss": score})
    manager.close()
    assert checkpoint.steps(tmp_path / "c") == [2, 3]


def test_a_healthy_checkpoint_is_not_blamed_for_what_others_did(saved, monkeypatch):
    def restore(error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(checkpoint, "_read", fail)
        checkpoint.read_experiment(saved[0], 3)

    with pytest.raises(MemoryError):
        restore(MemoryError("RESOURCE_EXHAUSTED"))
    with pytest.raises(InputError, match=r"cannot be read: .*stale"):
        restore(OSError(116, "stale file handle"))


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint32, jnp.bool_]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_digest_sees_every_single_bit(dtype, key):
    x = np.asarray(jax.random.normal(key, (5, 3)) > 0 if dtype == jnp.bool_ else
                   (100 * jax.random.normal(key, (5, 3))).astype(dtype))  # fmt: skip
    whole = checkpoint.digest({"x": jnp.asarray(x)})["x"]
    raw = x.view(np.uint8)
    bits = 1 if dtype == jnp.bool_ else 8
    for place in range(raw.size):
        for bit in range(bits):
            broken = raw.copy()
            broken.reshape(-1)[place] ^= 1 << bit
            found = checkpoint.digest({"x": jnp.asarray(broken.view(x.dtype))})["x"]
            assert found[0] != whole[0] and found[1] != whole[1]


def test_digest_sees_order_and_not_the_mesh(key):
    x = jax.random.normal(key, (16, 8))
    whole = checkpoint.digest({"x": x})["x"]
    assert checkpoint.digest({"x": x[::-1]})["x"] != whole
    assert checkpoint.digest({"x": x.T})["x"] != whole
    for sizes, spec in (
        ("data=8", jax.P("data")),
        ("fsdp=2,tensor=4", jax.P("tensor", "fsdp")),
    ):
        placed = jax.device_put(x, jax.NamedSharding(make_mesh(sizes), spec))
        assert checkpoint.digest({"x": placed})["x"] == whole


def array_files(folder):
    files = [p for p in (folder / "3" / "state").rglob("*") if p.is_file()]
    return sorted((p for p in files if p.parent.name == "d"), key=lambda p: -p.stat().st_size)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_found_by_its_leaf(place, saved, tmp_path, monkeypatch):
    """As in a file that is too great for a digest of its own."""
    monkeypatch.setattr(checkpoint, "_check_files", lambda folder: None)
    folder = copied(saved, tmp_path)
    flip(array_files(folder)[0], place)
    with pytest.raises(InputError, match=r"checkpoints/3 is damaged: .*go back to step 2"):
        checkpoint.restore(folder, 3, shapes(saved[1]))


def written(folder):
    """What is written before a checkpoint gets its name; Orbax writes two files at that."""
    last = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in last)


def test_any_file_that_is_changed_or_gone_is_found(saved, tmp_path):
    """Also one that a restore does not read, such as the tree of each process's own file."""
    folder = copied(saved, tmp_path)
    for path in written(folder / "3"):
        whole = path.read_bytes()
        for wrong in (lambda p: flip(p, 0.5), cut, pathlib.Path.unlink):
            wrong(path)
            with pytest.raises(checkpoint.Damaged, match="checkpoints/3 is damaged"):
                checkpoint.restore(folder, 3, shapes(saved[1]))
            path.write_bytes(whole)
    assert checkpoint.restore(folder, 3, shapes(saved[1])), "whole again"


def test_of_a_great_file_only_the_size_is_listed(saved, tmp_path, monkeypatch):
    folder = copied(saved, tmp_path)
    victim = array_files(folder)[0]
    monkeypatch.setattr(checkpoint, "_WHOLE", victim.stat().st_size - 1)
    checkpoint._list_files(folder / "3")
    flip(victim, 0.5)
    checkpoint._check_files(folder / "3")
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not the bytes that were written"):
        checkpoint._check_files(folder / "3")


def test_one_that_was_written_before_files_were_listed_is_read(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_list_files", lambda folder: None)
    manager = checkpoint.open_manager(tmp_path / "c")
    checkpoint.save(manager, 1, {"x": jnp.ones(2)}, batches(), {})
    manager.close()
    target = shapes({"x": jnp.ones(2)})
    with pytest.raises(checkpoint.Damaged, match=r"files.json"):
        checkpoint.restore(tmp_path / "c", 1, target)
    digests = tmp_path / "c" / "1" / "digests" / "metadata"
    proof = json.loads(digests.read_text())
    del proof["files"]
    digests.write_text(json.dumps(proof))
    assert checkpoint.restore(tmp_path / "c", 1, target)


def damage_truncate(folder):
    cut(array_files(folder)[0])


def damage_delete(folder):
    array_files(folder)[0].unlink()


def damage_metadata(folder):
    (folder / "3" / "state" / "_METADATA").write_text("{}")


def damage_digests(folder):
    for path in (folder / "3" / "digests").glob("*"):
        path.write_text(path.read_text().replace("1", "2"))


def damage_position(folder):
    for path in (folder / "3" / "data").rglob("*.json"):
        path.write_text(json.dumps({"step": 5}))


def damage_item(folder):
    shutil.rmtree(folder / "3" / "state")


def damage_onward(folder):
    checkpoint.go_on(folder, 3, batches())
    path = folder / "3" / "onward.json"
    path.write_text(path.read_text().replace('"step": 0', '"step": 5'))


DAMAGES = [damage_truncate, damage_delete, damage_metadata, damage_digests, damage_position,
           damage_item, damage_onward]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_damage_is_found_and_the_one_before_is_whole(damage, saved, tmp_path):
    folder = copied(saved, tmp_path)
    damage(folder)
    with pytest.raises(InputError, match="checkpoints/3 is damaged") as error:
        checkpoint.restore(folder, 3, shapes(saved[1]), batches())
    assert "\n" not in str(error.value)
    assert checkpoint.restore(folder, 2, shapes(saved[1]), batches())


def test_an_experiment_that_was_changed_on_disk_is_found(saved, tmp_path):
    folder = copied(saved, tmp_path)
    for path in (folder / "3" / "experiment").glob("*"):
        path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(InputError, match="damaged: the experiment's digest does not match"):
        checkpoint.read_experiment(folder, 3)


def test_a_state_of_other_shapes_lists_every_difference(saved):
    folder, tree = saved
    target = shapes(tree)
    params = target["state"].params
    params["a"]["kernel"] = jax.ShapeDtypeStruct((256, 32), jnp.bfloat16)
    params["c"] = params.pop("b")
    with pytest.raises(InputError) as error:
        checkpoint.restore(folder, 3, target)
    lines = str(error.value).splitlines()
    assert "does not fit this experiment" in lines[0]
    assert lines[1:] == [
        "- state/params/a/kernel float32[256, 64]",
        "+ state/params/a/kernel bfloat16[256, 32]",
        "- state/params/b/bias float32[3]",
        "+ state/params/c/bias float32[3]",
    ]


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint; name a directory"):
        checkpoint.find(tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "nowhere")
