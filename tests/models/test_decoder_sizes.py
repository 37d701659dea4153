import math

import jax
import jax.numpy as jnp
import pytest

from jaxformer.models.decoder import flops
from jaxformer.models.decoder_sizes import SIZES, named

# As published, or as transformers counts them; 174.6 of the 175 billions of GPT-3.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
}


def test_no_size_is_missing():
    assert SIZES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_its_parameters(name):
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(named(name).init, jax.random.key(0), tokens)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["gpt2", "gemma2-2b", "mistral-7b"])
def test_flops_are_what_is_multiplied(name):
    """Beside XLA's own count of a small model of that kind, without its softmaxes."""
    model = named(
        name, vocab=64, width=32, mlp_dim=48, depth=2, num_heads=4, head_dim=16, length=64
    ).clone(num_kv_heads=2, windows=(None,), causal=False)
    tokens = jnp.zeros((1, 64), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    lowered = jax.jit(model.clone(unroll=2).apply).lower(variables, tokens)
    counted = lowered.compile().cost_analysis()["flops"]
    assert counted == pytest.approx(flops(model, (64,)), rel=0.2)


def test_windows_and_causality_save_work():
    model = named("mistral-7b")
    full = flops(model.clone(windows=(None,)), (8192,))
    assert (
        flops(model, (8192,))
        < full
        < flops(model.clone(windows=(None,), causal=False), (8192,))
    )


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'llama-9b' is no decoder; known are gpt2, "):
        named("llama-9b")
