"""The loss by its formula, packed texts apart, and how much memory its logits take."""

import math
from types import SimpleNamespace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxformer import metrics, steps
from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.objectives.next_token import NextToken, following
from jaxformer.ops.mask import Causal
from tests.layers.test_block import randomized

V = 19
MODEL = Decoder(vocab=V, width=16, depth=2, mlp_dim=24, num_heads=2)


class Leaves(nn.Module):
    """A model whose layers leave losses behind, as experts do."""

    def setup(self):
        self.table = self.param("embedding", nn.initializers.normal(1.0), (V, 8))

    def hidden(self, tokens, *, segments=None, train=False):
        self.sow("losses", "balance", jnp.array([0.25, 0.5]))
        self.sow("losses", "router_z", jnp.array(0.125))
        self.sow("stats", "max_logit", jnp.array([3.0]))
        return self.table[tokens]

    def logits(self, x):
        return jnp.einsum("BTD,VD->BTV", x, self.table)

    def __call__(self, tokens):
        return self.logits(self.hidden(tokens))


TABLE = Leaves()


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    return randomized(jax.jit(MODEL.init)(jax.random.key(0), tokens), jax.random.key(1))


def texts(rows=3, length=11):
    return jax.random.randint(jax.random.key(2), (rows, length), 0, V)


def plain(params, batch, z_loss):
    """Cross-entropy as it is written down, over all logits."""
    logits = TABLE.apply({"params": params}, batch["tokens"])[:, :-1]
    targets = batch["tokens"][:, 1:]
    lse = jax.nn.logsumexp(logits, -1)
    nats = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    weight = following(batch)[1][:, :-1]
    return ((nats + z_loss * lse**2) * weight).sum() / weight.sum() + 0.875


SEGMENTS = jnp.array([[1] * 5 + [2] * 6, [1] * 3 + [2] * 3 + [0] * 5, [7] * 11])
ANSWER = jnp.array([[0, 0, 1] * 3 + [1, 1]] * 3)
BATCHES = {
    "texts": {},
    "segments": {"segments": SEGMENTS},
    "answers": {"segments": SEGMENTS, "answer": ANSWER},
    "weights": {"segments": SEGMENTS, "weight": jnp.array([1.0, 0.0, 1.0])},
}


@pytest.mark.parametrize("chunk", [None, 4, 11, 64])
@pytest.mark.parametrize("name", BATCHES)
def test_the_loss_and_its_gradient_are_those_of_the_formula(name, chunk, key):
    batch = {"tokens": texts(), **BATCHES[name]}
    params = TABLE.init(key, batch["tokens"])["params"]
    objective = NextToken(z_loss=0.01, chunk=chunk)

    @jax.jit
    def both(params):
        ours = jax.value_and_grad(lambda p: objective.loss(TABLE.apply, p, batch, key)[0])
        return ours(params), jax.value_and_grad(plain)(params, batch, 0.01)

    chex.assert_trees_all_close(*both(params), rtol=2e-5, atol=1e-6)


def test_targets_stay_in_their_text_and_among_the_answers():
    _, weight = following({"tokens": texts(), "segments": SEGMENTS})
    assert weight[0].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    assert weight[1].tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    targets, weight = following({"tokens": texts(), "answer": ANSWER})
    assert weight[0].tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0]
    assert targets[0, :10].tolist() == texts()[0, 1:].tolist()


def test_packed_texts_count_as_texts_alone(params, key):
    measure = jax.jit(NextToken(chunk=3).measure, static_argnums=0)
    row = texts(1, 11)
    packed = {"tokens": row, "segments": jnp.array([[1] * 4 + [2] * 5 + [0] * 2])}
    packed["bytes"] = jnp.arange(11)[None]
    parts = [
        {"tokens": row[:, a:b], "bytes": packed["bytes"][:, a:b]} for a, b in ((0, 4), (4, 9))
    ]
    alone = [metrics.to_host(measure(MODEL.apply, params, part, key)) for part in parts]
    both = metrics.to_host(measure(MODEL.apply, params, packed, key))
    chex.assert_trees_all_close(both, metrics.merge(*alone), rtol=1e-5)
    assert both["loss"].count == 3 + 4
    assert both["bits_per_byte"].count == (1 + 2 + 3) + (5 + 6 + 7 + 8)
    nats = both["loss"].sum
    assert both["bits_per_byte"].value() == pytest.approx(nats / math.log(2) / 32, rel=1e-5)
    assert both["perplexity"].value() == pytest.approx(math.exp(nats / 7), rel=1e-5)


def test_a_uniform_model_gives_log_v_and_is_right_by_no_luck(params, key):
    params = jax.tree.map(jnp.zeros_like, params)
    batch = {"tokens": texts(), "bytes": jnp.ones((3, 11), jnp.int32)}
    loss, found = jax.jit(NextToken().loss, static_argnums=0)(MODEL.apply, params, batch, key)
    assert loss == pytest.approx(math.log(V)) and found["accuracy"] == 0
    found = jax.jit(NextToken().measure, static_argnums=0)(MODEL.apply, params, batch, key)
    assert found["perplexity"].value() == pytest.approx(V, rel=1e-5)
    assert found["bits_per_byte"].value() == pytest.approx(math.log2(V), rel=1e-5)


def test_what_layers_leave_is_added_and_told(key):
    model, batch = TABLE, {"tokens": texts()}
    params = model.init(key, batch["tokens"])["params"]
    loss, found = NextToken().loss(model.apply, params, batch, key)
    assert found["balance"] == 0.75 and found["router_z"] == 0.125
    assert loss == pytest.approx(float(found["nats"]) + 0.875)
    _, told = steps.with_stats(NextToken().loss, model.apply)(params, batch, key)
    assert told["stats"]["max_logit"] and told["balance"] == 0.75
    assert "balance" not in NextToken().measure(model.apply, params, batch, key)


def test_ids_beyond_the_vocabulary_are_refused():
    source = SimpleNamespace(vocab=257, tokenizer=Causal())
    said = r"Causal has ids up to 256, but model\.vocab=19; set model\.vocab=257"
    with pytest.raises(InputError, match=said):
        NextToken().check(MODEL, SimpleNamespace(source=source))
    NextToken().check(MODEL, SimpleNamespace(source=SimpleNamespace(vocab=V)))
    with pytest.raises(InputError, match=r"causal=False sees the next token; set model.causal"):
        NextToken().check(MODEL.clone(causal=False), SimpleNamespace(source=None))
    with pytest.raises(InputError, match="chunk=0 must be 1 token or more"):
        NextToken(chunk=0)


def test_no_logits_of_the_whole_text_lie_in_memory_at_once(key):
    """Compiled and not run: V = 128k, of which float32 logits of all tokens are 1 GB."""
    B, T, vocab = 4, 512, 128 * 1024
    model = Decoder(vocab=vocab, width=32, depth=1, mlp_dim=32, num_heads=2)
    batch = {"tokens": jax.ShapeDtypeStruct((B, T), jnp.int32)}
    params = nn.unbox(jax.eval_shape(model.init, key, jnp.zeros((1, T), jnp.int32)))["params"]

    def peak(chunk):
        def loss(params, batch):
            return NextToken(chunk=chunk).loss(model.apply, params, batch, key)[0]

        made = jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis()
        return made.temp_size_in_bytes

    logits, table = 4 * B * T * vocab, 4 * vocab * 32
    chunked, whole = peak(16), peak(None)
    print(f"\nlogits {logits:,} bytes, table {table:,}: {chunked:,} chunked, {whole:,} whole")
    assert 0 < chunked < logits / 4 and whole > logits


def test_with_a_prefix_what_is_no_answer_is_marked():
    seen = {}

    def apply(variables, *inputs, **options):
        seen.update(options)
        return (jnp.zeros((1, 4, V)), {}) if "mutable" in options else jnp.zeros((1, 4, V))

    answer = jnp.array([[0, 0, 1, 1]])
    batch = {"tokens": jnp.ones((1, 4), jnp.int32), "answer": answer}
    NextToken(chunk=None, prefix=True).measure(apply, {}, batch, jax.random.key(0))
    assert seen["prefix"].tolist() == [[True, True, False, False]]
