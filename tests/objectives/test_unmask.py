import contextlib
import functools
import itertools
import math
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.data.loader import Pipeline
from jaxformer.errors import InputError
from jaxformer.layers.moe import Experts
from jaxformer.models.decoder import Decoder
from jaxformer.objectives.schedules import Clipped, Cosine, Linear, LogLinear, Polynomial
from jaxformer.objectives.times import times
from jaxformer.objectives.unmask import (
    Unmask,
    by_count,
    by_time,
    exact,
    loss,
    nats,
    two_streams,
)
from jaxformer.steps import init_state, train_step
from tests.layers.test_block import randomized

SCHEDULES = [Linear(), Cosine(), Polynomial(3.0), LogLinear()]
N, V = 4, 3  # A language of 3 ** 4 texts, and a mask beside its tokens.
MASK = V
LAW = np.random.default_rng(0).dirichlet(np.full(V**N, 0.3)).reshape((V,) * N)


def truth(tokens, share):
    """The logits of the exact conditionals, float64: sums over all that agrees."""
    out = np.zeros((*tokens.shape, V + 1))
    for row, logits in zip(np.asarray(tokens), out, strict=True):
        seen = tuple(slice(None) if t == MASK else slice(t, t + 1) for t in row)
        for i in range(N):
            rest = tuple(a for a in range(N) if a != i)
            found = LAW[seen].sum(rest)
            logits[i, :V] = np.log(found if len(found) == V else np.eye(V)[row[i]] + 1e-300)
            logits[i, V] = 5.0  # The mask, which is not to be guessed.
    return jnp.asarray(out)


def wrong(tokens, share):
    """Some other guess."""
    logits = np.random.default_rng(1).normal(size=(N, V + 1))
    return jnp.asarray(logits + 0.3 * (np.asarray(tokens) == MASK).sum(1)[:, None, None])


SETS = np.array([s for s in itertools.product([False, True], repeat=N) if any(s)])
TEXTS = np.array(list(itertools.product(range(V), repeat=N)))


def by_set(tokens, denoise):
    """For each text and set of masked tokens, the nats of all that are masked."""
    found = []
    with jax.enable_x64(True):
        for hides in SETS:
            noisy = np.where(hides, MASK, tokens)
            each = np.asarray(nats(denoise(noisy, None), jnp.asarray(tokens), MASK))
            found.append(each[:, hides].sum(1))
    return np.stack(found, 1)


def chances(q):
    """How likely each set is to be what is masked."""
    m = SETS.sum(1)
    return q[..., None] ** m * (1 - q[..., None]) ** (N - m)


def integral(schedule, sums, start=0.0):
    """The bound of each text by quadrature over time, of `by_set`."""
    t, w = np.polynomial.legendre.leggauss(80)
    t, w = start + (1 - start) * (t + 1) / 2, w / 2 * (1 - start)
    with jax.enable_x64(True):
        q = np.asarray(schedule.masked(jnp.asarray(t)))
        rate = np.asarray(schedule.rate(jnp.asarray(t)))
    return sums @ (chances(q) * (w * rate)[:, None]).sum(0)


def test_with_the_truth_the_bound_is_the_likelihood_of_every_text():
    with jax.enable_x64(True):
        for tokens in itertools.product(range(V), repeat=N):
            found = float(exact(truth, jnp.array(tokens), mask_id=MASK))
            assert found == pytest.approx(-math.log(LAW[tokens]), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_with_any_guess_it_is_a_bound(seed):
    """Of the law that the guesses make when one token is shown at a time, in any order."""
    draw = np.random.default_rng(seed)
    table = 2 * draw.normal(size=((V + 1) ** N, N, V + 1))  # Other logits for each canvas.
    guess = lambda tokens, _: jnp.asarray(table[tokens @ (V + 1) ** np.arange(N)])  # noqa: E731
    for tokens in draw.permutation(TEXTS)[:3]:
        with jax.enable_x64(True):
            bound = float(exact(guess, jnp.array(tokens), mask_id=MASK))
            orders = []
            for order in itertools.permutations(range(N)):
                row, total = np.full(N, MASK), 0.0
                for i in order:
                    each = nats(guess(row[None], None), jnp.array(tokens)[None], MASK)
                    total += float(each[0, i])
                    row[i] = tokens[i]
                orders.append(total)
        assert bound == pytest.approx(np.mean(orders), abs=1e-12)
        assert bound > -math.log(np.exp(-np.array(orders)).mean())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_all_schedules_have_the_same_bound(schedule):
    tokens = np.array([0, 2, 1, 1])
    with jax.enable_x64(True):
        whole = float(exact(wrong, jnp.array(tokens), mask_id=MASK))
    (found,) = integral(schedule, by_set(tokens[None], wrong))
    if not schedule.unmasked_at_end:
        assert found == pytest.approx(whole, rel=1e-12)
    else:  # Less than all is asked for; what is not costs as much as any guess.
        assert found < whole < 1.01 * found
        mean = LAW.ravel() @ integral(schedule, by_set(TEXTS, truth))
        end = N * schedule.unmasked_at_end * math.log(V)
        assert mean < ENTROPY < mean + end < 1.01 * ENTROPY


ENTROPY = -(LAW * np.log(LAW)).sum()


@pytest.mark.parametrize("floor", [1e-3, 1e-2])
def test_leaving_the_first_times_out_is_no_bound_and_showing_them_in_one_step_is(floor):
    sums = by_set(TEXTS, truth)
    left_out = LAW.ravel() @ integral(Linear(), sums, start=floor)
    ours = left_out + LAW.ravel() @ (sums @ chances(np.array(floor)))
    print(
        f"floor {floor}: left out {left_out / ENTROPY - 1:.4%}, ours {ours / ENTROPY - 1:.5%}"
    )
    assert left_out < ENTROPY <= ours < 1.001 * ENTROPY


@pytest.mark.parametrize("draw", ["count", *SCHEDULES], ids=str)
def test_draws_have_the_bound_as_their_mean(draw):
    tokens = jnp.broadcast_to(jnp.array([0, 2, 1, 1])[None], (40_000, N))
    if draw == "count":
        noisy, end = by_count(tokens, jax.random.key(0), mask_id=MASK), 0.0
    else:
        noisy = by_time(tokens, jax.random.key(0), mask_id=MASK, schedule=draw)
        end = draw.unmasked_at_end * N * math.log(V)
    hides = np.asarray(noisy.tokens) == MASK
    assert ((np.asarray(noisy.weight) > 0) == hides).all()
    sums = by_set(np.asarray(tokens[:1]), wrong)[0]
    number = 2 ** np.arange(N)[::-1] @ hides.T  # The set that is masked; 0 is none.
    rows = np.concatenate([[0], sums])[number] * np.asarray(noisy.weight).max(1)
    whole = float(exact(wrong, tokens[0], mask_id=MASK))
    error = float(rows.std()) / math.sqrt(len(rows))
    assert rows.mean() + end == pytest.approx(whole, abs=4 * error + N * 1e-3 * math.log(V))


def test_below_the_floor_what_is_masked_weighs_as_one_step():
    """And not 0, as if the first thousandth of time were no time."""
    tokens, at = jnp.zeros((5_000, N), jnp.int32), jnp.array([5e-4, 2e-3, 0.5])
    for time, weight in zip(at.tolist(), (1000, 500, 2), strict=True):
        times_of = jnp.full((len(tokens), 1), time)
        noisy = by_time(tokens, jax.random.key(0), mask_id=MASK, at=times_of, floor=1e-3)
        hides = noisy.tokens == MASK
        assert hides.any()
        np.testing.assert_allclose(noisy.weight[hides], weight, rtol=1e-5)
        np.testing.assert_allclose(noisy.share, max(time, 1e-3), rtol=1e-5)
        assert (noisy.weight[~hides] == 0).all()


def test_what_a_schedule_leaves_seen_at_its_end_is_told_by_the_pure_loss():
    tokens = jnp.broadcast_to(jnp.array([0, 2, 1, 1])[None], (64, N))
    for schedule in (Linear(), LogLinear(0.1)):
        how = {"mask_id": MASK, "schedule": schedule}
        found, _ = loss(wrong, tokens, jax.random.key(3), **how)
        noisy = by_time(tokens, jax.random.key(3), **how)
        each = nats(wrong(noisy.tokens, None), tokens, MASK) * noisy.weight
        end = 0.1 * math.log(V) if schedule != Linear() else 0
        chex.assert_trees_all_close(found, each.sum() / (64 * N) + end, rtol=1e-5)


def test_the_pure_loss_is_the_same_estimate():
    tokens = jnp.broadcast_to(jnp.array([0, 2, 1, 1])[None], (64, N))
    found, seen = loss(wrong, tokens, jax.random.key(3), mask_id=MASK)
    noisy = by_time(tokens, jax.random.key(3), mask_id=MASK)
    each = nats(wrong(noisy.tokens, None), tokens, MASK) * noisy.weight
    chex.assert_trees_all_close(found, each.sum() / (64 * N), rtol=1e-5)
    assert 0 < seen["masked"] < 1
    uniform, _ = loss(
        lambda x, share: jnp.zeros((*x.shape, V + 1)), tokens, jax.random.key(3), mask_id=MASK
    )
    chex.assert_trees_all_close(
        uniform, (noisy.weight.sum() / (64 * N)) * math.log(V), rtol=1e-5
    )


@pytest.mark.parametrize("n", [1, 49, 98])
def test_times_are_one_in_each_part(n):
    found = np.sort(np.asarray(times(jax.random.key(0), n, 1))[:, 0])
    assert ((found * n).astype(int) == np.arange(n)).all()


def test_a_mean_over_stratified_times_varies_less():
    def spread(draw):
        keys = jax.random.split(jax.random.key(0), 400)
        return np.asarray(jax.vmap(lambda k: (draw(k) ** 2).mean())(keys)).var()

    def parts(draw, n):
        """The same in 8 micro-batches, or on 8 devices, each by itself."""
        return lambda k: jax.vmap(lambda k: draw(k, n // 8))(jax.random.split(k, 8)).ravel()

    def grid(k, n):
        return (jax.random.uniform(k) + jnp.arange(n) / n) % 1

    found = {
        "ours": spread(lambda k: times(k, 64)),
        "ours in 8 parts": spread(parts(times, 64)),
        "one offset": spread(lambda k: grid(k, 64)),
        "one offset in 8 parts": spread(parts(grid, 64)),
        "iid": spread(lambda k: jax.random.uniform(k, (64,))),
    }
    told = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    print(f"variance of the mean of t ** 2 over 64 rows: {told}")
    assert found["ours"] < min(v for n, v in found.items() if n != "ours") / 10
    assert found["ours"] < found["iid"] / 100


@pytest.mark.parametrize("block", [None, 2])
def test_micro_batches_share_the_strata_of_the_whole_batch(block):
    objective = Unmask(9, block=block)

    def loss_fn(params, batch, key):
        at = batch["times"].ravel()
        hits = jnp.zeros(32).at[(at * 32).astype(int)].add(4.0)
        noisy = objective._noisy(batch["tokens"], key, None, "count", batch["times"])
        share = jnp.abs(noisy.share[:, :: block or 4] - batch["times"]).max()
        return (params * 0).sum(), {f"{i:02}": h for i, h in enumerate(hits)} | {"apart": share}

    tokens = jnp.zeros((32, 4) if block is None else (16, 4), jnp.int32)
    tx = optax.sgd(0.1)
    state = init_state(jnp.ones(1), tx)
    take = functools.partial(train_step, loss_fn=loss_fn, tx=tx, prepare=objective.prepare)
    _, seen = jax.jit(functools.partial(take, accumulate=4))(
        state, {"tokens": tokens}, jax.random.key(0)
    )
    hits = [v for n, v in seen.items() if n.isdigit()]
    assert len(hits) == 32 and all(hit == 1 for hit in hits)
    assert seen["apart"] < 1 / (block or 4)  # As many are masked as these times say.


T = 8
MODEL = Decoder(12, 16, 2, 24, 4, num_kv_heads=2, causal=False)


@functools.cache
def case():
    tokens = jax.random.randint(jax.random.key(0), (2, T), 0, 11)
    variables = jax.jit(MODEL.init)(jax.random.key(1), tokens)
    return tokens, randomized(variables, jax.random.key(2))


def test_a_bound_that_is_drawn_tells_its_error():
    """Strata make the draw vary less than its rows by themselves, of which the error is."""
    tokens, params = case()
    objective = Unmask(11, chunk=None, samples=4)
    batch = {"tokens": tokens, "bytes": jnp.full_like(tokens, 2)}

    def measure(key):
        found = objective.measure(MODEL.apply, params, batch, key)
        errors = (found[name].sum for name in ("bits_per_byte_error", "loss_error"))
        return found["bits_per_byte"].sum / 32, *map(jnp.sqrt, errors)

    mean, bits, nats = jax.jit(jax.vmap(measure))(jax.random.split(jax.random.key(0), 64))
    assert mean.std() < 1.2 * bits.mean() / 32 < 4 * mean.std()
    np.testing.assert_allclose(bits * np.log(2), nats, rtol=1e-5)


def test_blocks_of_one_are_the_next_token():
    """Each token is guessed by those before it alone: the same weights, seen causally."""
    tokens, params = case()
    masked = jnp.full_like(tokens, 11)
    rows, more = two_streams(masked, tokens, 1)
    found = jax.jit(MODEL.apply)({"params": params}, rows, **more)[:, :T]
    causal = jax.jit(MODEL.clone(causal=True).apply)
    for i in range(T):
        alone = causal({"params": params}, tokens.at[:, i].set(11))[:, i]
        chex.assert_trees_all_close(found[:, i], alone, atol=1e-5)


def test_one_block_is_masked_diffusion():
    tokens, params = case()
    batch, key = {"tokens": tokens}, jax.random.key(5)
    both = [
        jax.jit(functools.partial(Unmask(11, block=block, chunk=4).loss, MODEL.apply))
        for block in (None, T)
    ]
    (a, _), (b, _) = (run(params, batch, key) for run in both)
    chex.assert_trees_all_close(a, b, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_no_clean_token_of_its_own_block_or_later_is_seen(block):
    tokens, params = case()
    rows, more = two_streams(jnp.full_like(tokens, 11), tokens, block)
    parts = MODEL.parts()
    x = parts.apply({"params": params}, rows, method="embed")

    @jax.jit
    @jax.grad
    def seen(x, i):
        return parts.apply({"params": params}, x, method="run", **more)[0, i].sum()

    for i in range(T):
        reached = np.asarray(jnp.abs(seen(x, i)[0]).sum(-1)) > 0
        first = i // block * block
        assert reached[T : T + first].all() and not reached[T + first :].any()


@pytest.mark.parametrize("block", [None, 4])
def test_packed_texts_are_guessed_as_alone(block):
    tokens, params = case()
    noisy = tokens.at[:, ::3].set(11)
    segments = jnp.array([[1] * 4 + [2] * 4] * 2)

    def run(noisy, tokens, segments=None):
        if block is None:
            more = {} if segments is None else {"segments": segments}
            return jax.jit(MODEL.apply)({"params": params}, noisy, **more)
        batch = None if segments is None else {"segments": segments}
        rows, more = two_streams(noisy, tokens, block, batch)
        return jax.jit(MODEL.apply)({"params": params}, rows, **more)[:, : tokens.shape[1]]

    together = run(noisy, tokens, segments)
    for part in (slice(0, 4), slice(4, 8)):
        alone = run(noisy[:, part], tokens[:, part])
        chex.assert_trees_all_close(together[:, part], alone, atol=1e-5)


def test_prompts_and_padding_are_never_masked():
    tokens, params = case()
    answer = jnp.array([[0, 0, 0, 1, 1, 1, 1, 0]] * 2)
    for draw in (by_time, by_count):
        noisy = draw(tokens, jax.random.key(1), mask_id=11, hidden=answer > 0)
        assert ((noisy.tokens == tokens) | (answer > 0)).all()
    batch = {"tokens": tokens, "answer": answer}
    run = jax.jit(functools.partial(Unmask(11, samples=2).measure, MODEL.apply))
    assert run(params, batch, jax.random.key(0))["loss"].count == answer.sum()


@pytest.mark.parametrize("block", [None, 2])
def test_what_a_guess_costs_is_what_the_loss_weighs(block):
    tokens, params = case()
    objective = Unmask(11, block=block, shift=True, chunk=None)
    hidden = jnp.arange(8)[None].repeat(len(tokens), 0) > 0
    drawn, _ = jax.random.split(jax.random.key(0))
    segments = jnp.where(jnp.arange(8) < 3, 1, 2)[None].repeat(len(tokens), 0)
    batch = {"tokens": tokens, "segments": segments}
    hidden &= jnp.arange(8)[None] != 3  # The first of the second text.
    noisy = by_time(tokens, drawn, mask_id=11, block=block, hidden=hidden)
    each = jax.jit(objective.costs(MODEL.apply, params, batch))(noisy.tokens, tokens)
    run = jax.jit(functools.partial(objective.loss, MODEL.apply))
    found, _ = run(params, batch, jax.random.key(0))
    wanted = (each * noisy.weight).sum() / hidden.sum()
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_experts_are_balanced_as_they_are_for_the_next_token():
    """Each router's loss, of two layers, is in the loss and told beside it."""
    tokens, _ = case()
    losses = []
    for balance in (0.0, 0.5):
        model = MODEL.clone(experts=Experts(3, 2, balance=balance))
        params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
        run = jax.jit(functools.partial(Unmask(11, chunk=None).loss, model.apply))
        losses.append(run(nn.unbox(params), {"tokens": tokens}, jax.random.key(0)))
    (plain, _), (found, told) = losses
    assert 0.5 * 2 <= told["balance"] < 0.5 * 2 * 3  # 1 a layer where all are alike.
    chex.assert_trees_all_close(found - plain, told["balance"], rtol=1e-4)


class Text:
    vocab = 11

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {}


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (Unmask(12), MODEL, "mask_id=12 is no token of model.vocab=12"),
        (Unmask(10), MODEL, "leaves no id for the mask, mask_id=10; set mask_id=11"),
        (Unmask(11), MODEL.clone(causal=True), "set model.causal=False"),
    ],
)
def test_what_does_not_fit_is_told(objective, model, message):
    with pytest.raises(InputError, match=message):
        objective.check(model, Pipeline(Text()))


class Special:
    """A tokenizer of 12 ids: 0 begins a text, and 11 is special."""

    vocab, begin, end = 12, 0, None
    lengths = np.array([0, *[1] * 10, 0])


@pytest.mark.parametrize(("mask", "fits"), [(11, True), (10, False), (0, False)])
def test_a_mask_that_the_tokenizer_has_is_no_text(mask, fits):
    """Those of LLaDA and Dream have theirs, which no text holds."""
    source = Text()
    source.vocab = 12
    source.tokens = types.SimpleNamespace(tokenizer=Special(), lengths=Special.lengths)
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="leaves no id"):
        Unmask(mask).check(MODEL, Pipeline(source))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "objective.samples=0 must be 1 or more"),
        ({"chunk": 0}, "objective.chunk=0 must be 1 or more"),
        ({"block": 0}, "objective.block=0 must be 1 or more"),
        ({"draw": "counts"}, "objective.draw='counts' must be time or count"),
        ({"schedule": Clipped(0.3, 0.8), "draw": "count"}, "a Clipped schedule is of times"),
    ],
)
def test_numbers_that_cannot_be_are_told(fields, message, unchecked):
    with pytest.raises(InputError, match=message):
        Unmask(11, **fields)


def test_blocks_that_do_not_divide_the_row_are_told():
    for draw in (by_time, by_count):
        with pytest.raises(InputError, match="block=3 must divide the row of 8 tokens"):
            draw(jnp.zeros((2, 8), jnp.int32), jax.random.key(0), mask_id=11, block=3)
    tokens, params = case()
    with pytest.raises(InputError, match="block=3 must divide the row of 8 tokens"):
        Unmask(11, block=3).loss(MODEL.apply, params, {"tokens": tokens}, jax.random.key(0))
