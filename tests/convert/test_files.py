"""Files that lie, are cut short, or hold something else: one sentence, nothing is read."""

import json
import shutil
import struct
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxformer import convert
from jaxformer.convert import command, engine, files
from jaxformer.errors import InputError
from tests.parity.case import RECORDED


@pytest.fixture
def saved(tmp_path):
    """A copy of a tiny ViT that may be damaged."""
    shutil.copytree(RECORDED / "vit_classify", tmp_path / "vit")
    return tmp_path / "vit"


def weights(directory):
    return {name: t.read() for name, t in files.open_tensors(directory).items()}


def change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def header(path, edit):
    """Rewrites the header of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    new = json.dumps(edit(json.loads(raw[8 : 8 + size]))).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


def longer(h):
    name = next(n for n in h if n != "__metadata__")
    h[name]["data_offsets"][1] += 4
    return h


def larger(h):
    name = next(n for n in h if n != "__metadata__")
    h[name]["shape"] = [10**9, 10**9]
    return h


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "empty": lambda p: p.write_bytes(b""),
    "no header": lambda p: p.write_bytes(b"x" * 100),
    "header of 2**63 bytes": lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "offsets beyond the data": lambda p: header(p, longer),
    "a shape that is not its bytes": lambda p: header(p, larger),
    "a pickle": lambda p: p.write_bytes(b"\x80\x04\x95" + b"0" * 50),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_refused(saved, how):
    DAMAGE[how](saved / files.WEIGHTS)
    with pytest.raises(InputError, match=r"is no whole safetensors file .*fetch it again"):
        convert.load(saved)


def test_a_config_that_is_missing_or_no_json(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        convert.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        convert.load(saved)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "resnet"}, r"model_type 'resnet' is not known; known are .*vit"),
        ({"patch_size": 5}, "patch_size=5 must divide image_size"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=24"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not known; known are gelu"),
        ({"hidden_size": "big"}, "hidden_size='big' must be a positive int"),
    ],
)
def test_a_config_that_cannot_be(saved, fields, said):
    change(saved, **fields)
    with pytest.raises(InputError, match=said):
        convert.load(saved)


def test_only_safetensors_are_read(saved):
    (saved / files.WEIGHTS).rename(saved / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle, which is never"):
        convert.load(saved)


def test_every_mismatch_is_told_at_once(saved):
    tensors = weights(saved)
    tensors["vit.surprise"] = tensors.pop("vit.layernorm.bias")
    name = "vit.encoder.layer.1.intermediate.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, saved / files.WEIGHTS)
    with pytest.raises(InputError) as error:
        convert.load(saved)
    said = str(error.value)
    assert "3 tensors" in said
    assert "- vit.layernorm.bias: missing" in said
    assert "+ vit.surprise: unknown" in said
    assert f"~ {name}: has shape (24, 40), not (40, 24) (transposed?)" in said


def test_shards_are_one_checkpoint(saved, tmp_path):
    model, params = convert.load(saved)
    convert.save(tmp_path / "out", model, params, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    again = weights(tmp_path / "out")
    for name, tensor in weights(saved).items():
        np.testing.assert_array_equal(again[name], tensor)
    convert.save(tmp_path / "out", model, params)  # Over it, in one file.
    assert weights(tmp_path / "out").keys() == again.keys()


def test_an_index_that_leads_outside_is_refused(saved, tmp_path):
    model, params = convert.load(saved)
    convert.save(tmp_path / "out", model, params, shard_bytes=20_000)
    index = tmp_path / "out" / files.INDEX
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../model-00001"))
    with pytest.raises(InputError, match="lies outside"):
        convert.load(tmp_path / "out")
    placed = json.loads(text)
    placed["weight_map"].pop("classifier.bias")
    index.write_text(json.dumps(placed))
    with pytest.raises(
        InputError, match=r"1 tensors are in the index alone .*classifier\.bias"
    ):
        convert.load(tmp_path / "out")


@pytest.mark.parametrize("size", [64, 512])
def test_pieces_make_the_whole(saved, monkeypatch, size):
    """Also where a piece is a part of a head's rows, and on any mesh."""
    from jaxformer.sharding import make_mesh

    _, whole = convert.load(saved)
    monkeypatch.setattr(engine, "PIECE", size)
    _, pieces = convert.load(saved, mesh=make_mesh("fsdp=4,data=2"))
    np.testing.assert_equal(_numpy(pieces), _numpy(whole))
    kernel = pieces["stack"]["block"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 6, 40)


def _numpy(tree):
    import jax

    return jax.tree.map(np.asarray, tree)


def test_names_of_transformers_5_in_memory_are_taken(saved):
    _, expected = convert.load(saved)
    new = {}
    for name, tensor in weights(saved).items():
        for old, memory in (
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(old, memory)
        new[name] = tensor
    save_file(new, saved / files.WEIGHTS)
    np.testing.assert_equal(_numpy(convert.load(saved)[1]), _numpy(expected))


def test_saving_what_no_family_can_hold(saved, tmp_path):
    import dataclasses

    model, params = convert.load(saved)
    other = dataclasses.replace(model, norm=None)
    with pytest.raises(InputError, match="no family can hold this Encoder"):
        convert.save(tmp_path / "out", other, params)
    with pytest.raises(InputError, match="kind='resnet' is not known"):
        convert.save(tmp_path / "out", model, params, kind="resnet")
    del params["norm"]
    with pytest.raises(InputError, match="- norm/bias"):
        convert.save(tmp_path / "out", model, params)
    assert not (tmp_path / "out" / files.WEIGHTS).exists()


def test_the_command_tells_and_writes(saved, tmp_path, capsys):
    assert command.main([str(saved), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Encoder" in said and "parameters" in said and "written" in said
    assert weights(tmp_path / "out").keys() == weights(saved).keys()
    assert command.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_library_the_command_names_the_extra(monkeypatch, saved, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert command.main([str(saved)]) == 2
    said = capsys.readouterr().err
    assert 'need safetensors; run pip install "jaxformer[hf]"' in said and said.count("\n") == 1
