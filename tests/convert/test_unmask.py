import json

import flax.linen as nn
import numpy as np
import pytest

from jaxformer import convert
from jaxformer.convert import engine, files
from jaxformer.convert.families import FAMILIES
from jaxformer.errors import InputError
from jaxformer.models.mdlm import MASK_IDS, named
from jaxformer.ops.rotary_scaling import Linear, Rotary
from tests.convert.test_language import SMALL, random, rewritten, same
from tests.parity.case import RECORDED
from tests.parity.test_parity import load

# As on the hub, without what says nothing of the model.
PUBLISHED = {
    "llada-8b": {
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 4096,
        "embedding_size": 126464,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "vocab_size": 126464,
        "weight_tying": False,
    },
    "dream-7b": {
        "model_type": "Dream",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "mask_token_id": 151666,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configs_are_the_named_models(name):
    config = PUBLISHED[name]
    family = FAMILIES[config["model_type"]]
    model = family.model(dict(config), {"lm_head.weight"}, np.float32)
    assert engine._same(model, named(name).parts())
    again = family.config(model)
    assert again is not None
    told = {k: again.get(k) for k in config if k not in ("mlp_ratio", "multi_query_attention")}
    without = ("max_window_layers", "sliding_window", "use_sliding_window")
    for key, value in told.items():
        assert key in without or value == config[key], key
    assert again["mask_token_id"] == MASK_IDS[name]


@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_a_decoder_that_sees_both_ways_is_saved(kind, tmp_path):
    """By no family of decoders; and what comes back says the same."""
    model = SMALL.clone(causal=False, tied=kind == "llada", qkv_bias=kind == "Dream")
    with pytest.raises(InputError, match="llama cannot hold this LanguageModel"):
        convert.save(tmp_path, model, random(model), kind="llama")
    convert.save(tmp_path / "a", model, random(model))
    config = files.read_config(tmp_path / "a")
    assert config["model_type"] == kind and "mask_token_id" not in config
    again, params = convert.load(tmp_path / "a")
    same(params, nn.unbox(random(model)))
    assert again == convert.load(tmp_path / "a")[0] and not again.causal


def test_a_tied_head_that_is_there_all_the_same_is_taken_away(tmp_path):
    """The config says so; without a word LLaDA's class ties it."""

    def change(tensors):
        table = tensors["model.transformer.wte.weight"]
        return tensors | {"model.transformer.ff_out.weight": table.copy()}

    for config in ({"weight_tying": True}, {"weight_tying": None}):
        model, _ = rewritten(tmp_path, "llada", change, **config)
        assert model.head is None


def test_sizes_that_lladas_config_may_leave_out(tmp_path):
    fields = {"n_kv_heads": None, "multi_query_attention": True}
    config = files.read_config(RECORDED / "llada") | fields
    family = FAMILIES["llada"]
    model = family.model(config | {"mlp_hidden_size": None}, {"lm_head.weight"}, np.float32)
    block = model.stack.block
    assert block.attention.num_kv_heads == 1 and block.mlp.width == 4 * 24
    assert model.table.vocab == 19  # Rows of the table, not tokens.


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("llada", {"block_type": "sequential"}, "block_type='sequential' is not supported"),
        ("llada", {"alibi": True}, "alibi=True is not supported; it must be False"),
        ("llada", {"n_heads": 5}, "n_heads=5 must divide d_model=24"),
        ("llada", {"d_model": None, "n_layers": None}, "d_model, n_layers must be given"),
        ("llada", {"activation_type": "swiglu"}, "activation_type='swiglu' is not known"),
        ("Dream", {"hidden_act": "relu6"}, "hidden_act='relu6' is not known"),
    ],
)
def test_a_config_that_is_not_known_is_refused(name, fields, sentence):
    config = files.read_config(RECORDED / name.lower()) | fields
    with pytest.raises(InputError, match=sentence):
        FAMILIES[name].model(config, set(), np.float32)


def test_every_tensor_is_accounted_for(tmp_path):
    def change(tensors):
        tensors = dict(tensors)
        block = "model.transformer.blocks.1"
        tensors[f"{block}.att_proj.weight"] = tensors.pop(f"{block}.q_proj.weight")
        return tensors

    with pytest.raises(InputError, match="2 tensors are not those of llada") as error:
        rewritten(tmp_path, "llada", change)
    assert "+ model.transformer.blocks.1.att_proj.weight: unknown" in str(error.value)


def test_the_law_of_positions_is_told_in_words_of_transformers_4(tmp_path):
    model = SMALL.clone(causal=False, qkv_bias=True, rotary=Rotary(5e2, Linear(2.0)))
    convert.save(tmp_path, model, random(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e2
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert load("dream")[0].stack.block.attention.scores.rotary.theta == 1e2
