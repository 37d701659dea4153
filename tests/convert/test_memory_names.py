"""What transformers 5 calls tensors in memory, where it writes others: both are read.

`python -m tests.parity.make --check` asks transformers itself, for every case.
"""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxformer import convert
from jaxformer.convert import files
from tests.parity.case import RECORDED

ATTENTION = {
    r"attention\.attention\.query": "attention.q_proj",
    r"attention\.attention\.key": "attention.k_proj",
    r"attention\.attention\.value": "attention.v_proj",
    r"attention\.output\.dense": "attention.o_proj",
}
MLP = {r"intermediate\.dense": "mlp.fc1", r"(\d)\.output\.dense": r"\1.mlp.fc2"}
CASES = {
    "deit_teacher": {**ATTENTION, **MLP, r"encoder\.layer\.": "layers."},
    "vivit_classify": {**ATTENTION, **MLP, r"encoder\.layer\.": "layers."},
    "dinov2_registers": ATTENTION,
    "dinov2_classify": ATTENTION | {"weights_out": "down_proj"},
    "dinov3_gated": {r"^layer\.": "model.layer."},
    "videomae_classify": {r"\.q_bias": ".query.bias", r"\.v_bias": ".value.bias"},
}


@pytest.mark.parametrize("name", CASES)
def test_names_in_memory_are_read(name, tmp_path):
    tensors = safetensors.numpy.load_file(RECORDED / name / files.WEIGHTS)
    found = {}
    for key, x in tensors.items():
        for old, new in CASES[name].items():
            key = re.sub(old, new, key)
        if "weights_in" in key:  # SwiGLU's gate and up are apart.
            for part, half in zip(("gate_proj", "up_proj"), np.split(x, 2), strict=True):
                found[key.replace("weights_in", part)] = half
        else:
            found[key] = x
    assert found.keys() != tensors.keys()
    (tmp_path / "config.json").write_bytes((RECORDED / name / "config.json").read_bytes())
    safetensors.numpy.save_file(found, tmp_path / files.WEIGHTS)
    model, params = convert.load(tmp_path)
    expected, same = convert.load(RECORDED / name)
    assert model == expected
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_tensors_joined_are_read_as_one(tmp_path):
    arrays = [np.arange(n * 3.0).reshape(n, 3) + 100 * n for n in (2, 1, 4)]
    safetensors.numpy.save_file(
        {str(i): x for i, x in enumerate(arrays)}, tmp_path / "model.safetensors"
    )
    stored = files.open_tensors(tmp_path)
    joined, whole = files.join(*(stored[n] for n in "012")), np.concatenate(arrays)
    assert joined.shape == whole.shape and joined.dtype == whole.dtype
    np.testing.assert_array_equal(joined.read(), whole)
    for first in range(7):
        for last in range(first + 1, 8):
            rows = slice(first, last)
            np.testing.assert_array_equal(joined.read(rows), whole[rows])
