import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxformer import convert
from jaxformer.convert import files
from jaxformer.convert.engine import boxed_params
from jaxformer.convert.families import FAMILIES
from jaxformer.convert.stacks import arrange, layers_of
from jaxformer.errors import InputError
from jaxformer.layers.attention import Attention, Scores
from jaxformer.layers.block import Block, Chain, Mlp, SandwichBlock, Stack
from jaxformer.layers.moe import Experts
from jaxformer.layers.norm import LayerNorm, OneRMSNorm
from jaxformer.models.decoder import Decoder
from jaxformer.ops.activation import gelu_tanh
from jaxformer.ops.rotary_scaling import Linear, Rotary, YaRN
from tests.parity.case import RECORDED
from tests.parity.test_parity import load

SMALL = Decoder(vocab=9, width=8, depth=2, mlp_dim=6, num_heads=2, length=16)
GEMMA = {
    "block": SandwichBlock,
    "norm": OneRMSNorm,
    "activation": gelu_tanh,
    "embed_scale": 8**0.5,
    "windows": (4, None),
    "depth": 5,
}
DECODERS = {
    "llama": (SMALL, "llama"),
    "untied": (SMALL.clone(tied=False, num_kv_heads=1, qkv_bias=True), "qwen2"),
    "linear": (SMALL.clone(rotary=Rotary(5e5, Linear(2.0)), use_bias=True), "llama"),
    "no length": (SMALL.clone(length=None), "llama"),
    "window": (SMALL.clone(windows=(5,)), "mistral"),
    "some windows": (SMALL.clone(windows=(5, None), depth=3, qkv_bias=True), "qwen2"),
    "norms of queries": (SMALL.clone(qk_norm=True, epsilon=1e-5), "qwen3"),
    "gpt2": (
        SMALL.clone(
            positions="learned",
            norm=LayerNorm,
            gated=False,
            activation=gelu_tanh,
            use_bias=True,
            dropout=0.1,
        ),
        "gpt2",
    ),
    "gemma2": (SMALL.clone(**GEMMA, softcap=5.0, final_softcap=3.0), "gemma2"),
    "gemma3": (SMALL.clone(**GEMMA, qk_norm=True, local_rotary=Rotary(1e2)), "gemma3_text"),
    "experts": (SMALL.clone(experts=Experts(3, 2, balance=0.01)), "mixtral"),
    "weights as they are": (
        SMALL.clone(experts=Experts(3, 2, renormalise=False), qk_norm=True),
        "qwen3_moe",
    ),
}


def random(model):
    draw, shapes = np.random.default_rng(0), boxed_params(FAMILIES["llama"], model)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype("float32"), shapes)


DEFAULT = ("linear", "some windows", "gpt2", "gemma3", "weights as they are")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in DECODERS],
)
def test_a_decoder_of_numbers_is_saved(name, tmp_path):
    """By the family it fits, and what comes back has the same layers and is saved alike."""
    model, kind = DECODERS[name]
    convert.save(tmp_path / "a", model, random(model), kind=None if name == "gpt2" else kind)
    assert files.read_config(tmp_path / "a")["model_type"] == kind
    again, params = convert.load(tmp_path / "a")
    convert.save(tmp_path / "b", again, params, kind=kind)
    a, b = (files.open_tensors(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key].read(), b[key].read())
    assert again.length == model.length


def test_a_decoder_that_no_family_has_is_refused(tmp_path):
    for model in (SMALL.clone(positions="alibi"), SMALL.clone(last_norm=False)):
        with pytest.raises(InputError, match="no family can hold this LanguageModel"):
            convert.save(tmp_path, model, random(model))


def test_a_length_is_no_part_of_a_model(tmp_path):
    """It is what is checked: YaRN's config says how far it goes, whatever the model took."""
    model = SMALL.clone(rotary=Rotary(1e4, YaRN(4.0, 32)))
    convert.save(tmp_path, model, random(model), kind="llama")
    assert convert.load(tmp_path)[0].length == 128


def rewritten(tmp_path, name, change, **config):
    """A recorded model with other tensors and another config."""
    found = files.open_tensors(RECORDED / name)
    tensors = change({key: x.read() for key, x in found.items()})
    safetensors.numpy.save_file(tensors, tmp_path / files.WEIGHTS)
    config = files.read_config(RECORDED / name) | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    return convert.load(tmp_path)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_files_of_the_first_gpt2_are_read(tmp_path):
    """Without a prefix, with the causal mask among the tensors, and the tied head again."""

    def change(tensors):
        found = {key.removeprefix("transformer."): x for key, x in tensors.items()}
        masks = {f"h.{i}.attn.bias": np.ones((1, 1, 14, 14), "float32") for i in range(2)}
        return found | masks | {"lm_head.weight": found["wte.weight"].copy()}

    model, params = rewritten(tmp_path, "gpt2", change)
    expected, theirs = load("gpt2")
    assert model == expected
    same(params, theirs)


def test_a_head_that_is_not_the_table_is_believed(tmp_path):
    def change(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    model, params = rewritten(tmp_path, "qwen2", change)
    assert model.head is not None
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["table"]["embedding"] + 1)
    convert.save(tmp_path / "again", model, params, kind="qwen2")
    assert not files.read_config(tmp_path / "again")["tie_word_embeddings"]


def test_a_model_without_its_head_is_read(tmp_path):
    def change(tensors):
        return {key.removeprefix("model."): x for key, x in tensors.items()}

    model, params = rewritten(tmp_path, "gemma3", change)
    expected, theirs = load("gemma3")
    assert model == expected
    same(params, theirs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_read(name, tmp_path):
    """As transformers 5 has them in memory: gate and up beside each other, `[E, 2F, D]`."""
    gate, up, down = (
        ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )

    def change(tensors):
        found = {k.replace(".block_sparse_moe.", ".mlp."): x for k, x in tensors.items()}
        for key in [key for key in found if f".experts.0.{gate}." in key]:
            layer = key.removesuffix(f".0.{gate}.weight")

            def each(kind, layer=layer):
                return [found.pop(f"{layer}.{i}.{kind}.weight") for i in range(3)]

            pairs = zip(each(gate), each(up), strict=True)
            found[f"{layer}.gate_up_proj"] = np.stack([np.concatenate(p) for p in pairs])
            found[f"{layer}.down_proj"] = np.stack(each(down))
        assert not any(f".{gate}." in key for key in found if ".experts." in key)
        return found

    model, params = rewritten(tmp_path, name, change)
    expected, theirs = load(name)
    assert model == expected
    same(params, theirs)


def test_qwen_of_4_says_from_where_windows_are(tmp_path):
    fields = {"layer_types": None, "max_window_layers": 1}
    model, _ = rewritten(tmp_path, "qwen2", lambda tensors: tensors, **fields)
    assert [x.block.attention.scores.window for x in layers_of(model.stack)] == [None, 5, 5]
    fields |= {"use_sliding_window": False}
    model, _ = rewritten(tmp_path, "qwen2", lambda tensors: tensors, **fields)
    assert {x.block.attention.scores.window for x in layers_of(model.stack)} == {None}


def test_gemma_3_of_4_has_two_bases(tmp_path):
    fields = {"rope_parameters": None, "layer_types": None, "sliding_window_pattern": 2}
    fields |= {"rope_theta": 5e2, "rope_local_base_freq": 5e1}
    fields |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    model, _ = rewritten(tmp_path, "gemma3", lambda tensors: tensors, **fields)
    assert model == load("gemma3")[0]


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("llama", {"quantization_config": {}}, "quantization_config={} is not supported"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act='relu6' is not known"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be 3 of sliding"),
        ("qwen2", {"use_sliding_window": False}, "there is no window"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("gpt2", {"n_head": 3}, "n_head=3 must divide n_embd=20"),
        ("gemma3", {"use_bidirectional_attention": True}, "it must be false"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 is not"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be"),
    ],
)
def test_a_config_that_is_not_known_is_refused(name, fields, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        rewritten(tmp_path, name, lambda tensors: tensors, **fields)


def block(window):
    return Block(Attention(1, 2, scores=Scores(window=window)), Mlp(3))


def test_layers_are_arranged_to_compile_few():
    a, b = block(None), block(4)

    def arranged(windows):
        return arrange([block(4 if c == "b" else None) for c in windows])

    assert arranged("aaa") == Stack(a, 3)
    assert arranged("baba") == Stack(Chain((b, a)), 2)
    assert arranged("babab") == Chain((Stack(Chain((b, a)), 2), Stack(b, 1)))
    assert arranged("aaaabb") == Chain((Stack(a, 4), Stack(b, 2)))
    round_of_six = Stack(Chain((b, b, b, b, b, a)), 4)
    assert arranged("bbbbba" * 4 + "bb") == Chain((round_of_six, Stack(b, 2)))
    for windows in ("a", "ab", "bbbbba" * 4 + "bb", "aaaabb"):
        found = [layer.block for layer in layers_of(arranged(windows))]
        assert found == [b if c == "b" else a for c in windows]


def test_layers_have_their_rows_and_paths():
    stack = Chain((Stack(Chain((block(4), block(None))), 2), block(4)))
    assert [(layer.path, layer.row) for layer in layers_of(stack)] == [
        ("stack/parts_0/block/parts_0", 0),
        ("stack/parts_0/block/parts_1", 0),
        ("stack/parts_0/block/parts_0", 1),
        ("stack/parts_0/block/parts_1", 1),
        ("stack/parts_1", None),
    ]
    with pytest.raises(ValueError, match="a Stack within a Stack"):
        layers_of(Stack(Stack(block(4), 2), 2))
