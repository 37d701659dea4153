import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.objectives.schedules import Cosine
from jaxformer.samplers.logits import GREEDY, Law
from jaxformer.samplers.unmask import (
    Above,
    Bound,
    Chance,
    Count,
    FirstHitting,
    guided,
    sample,
)

N, V = 3, 3
MASK = V
LAW = np.random.default_rng(0).dirichlet(np.full(V**N, 0.5)).reshape((V,) * N)


def tables():
    """The exact conditionals' logits of every canvas: `[(V + 1) ** N, N, V + 1]`."""
    found = []
    for row in itertools.product(range(V + 1), repeat=N):
        seen = tuple(slice(None) if t == MASK else slice(t, t + 1) for t in row)
        logits = np.zeros((N, V + 1))
        for i in range(N):
            mass = LAW[seen].sum(tuple(a for a in range(N) if a != i))
            logits[i, :V] = np.log(mass) if len(mass) == V else 0
            logits[i, V] = 9  # The mask, which is never drawn.
        found.append(logits)
    return jnp.asarray(np.array(found), jnp.float32)


TABLES = tables()


def truth(tokens, share):
    return TABLES[tokens @ (V + 1) ** jnp.arange(N)[::-1]]


def empty(rows):
    return jnp.full((rows, N), MASK)


@functools.partial(jax.jit, static_argnames=("rows", "show", "block"))
def drawn(key, rows, show, block=None):
    return sample(truth, empty(rows), key, mask_id=MASK, show=show, block=block)


ROWS = 8_000


@pytest.mark.parametrize(
    ("show", "block"),
    [(Count(N, "random"), None), (Count(N), None), (Bound(0.0), None), (Count(1), 1)],
    ids=str,
)
def test_one_token_a_step_draws_the_exact_law(show, block):
    """In any order that is not chosen by the token that was drawn."""
    if show == Count(N):  # Confidence is of the token drawn: it leans to the likely.
        show = Count(N, "margin")
    made = drawn(jax.random.key(0), ROWS, show, block)
    number = np.asarray(made.tokens) @ V ** np.arange(N)[::-1]
    found = np.bincount(number, minlength=V**N) / ROWS
    error = 4 * np.sqrt(LAW.ravel() * (1 - LAW.ravel()) / ROWS) + 1e-3
    assert (np.abs(found - LAW.ravel()) < error).all()
    assert (np.sort(np.asarray(made.shown), 1) == np.arange(N)).all() and made.steps == N


@pytest.mark.parametrize(
    "schedule", [None, pytest.param(Cosine(), marks=pytest.mark.slow)], ids=str
)
def test_ancestral_draws_come_near_it_with_steps(schedule):
    options = {} if schedule is None else {"schedule": schedule}

    def distance(steps):
        made = drawn(jax.random.key(1), ROWS, Chance(steps, **options))
        number = np.asarray(made.tokens) @ V ** np.arange(N)[::-1]
        return np.abs(np.bincount(number, minlength=V**N) / ROWS - LAW.ravel()).sum() / 2

    one, many = distance(1), distance(24)
    independent = np.array(LAW.sum((1, 2)))[:, None, None] * LAW.sum((0, 2))[None, :, None]
    independent = independent * LAW.sum((0, 1))[None, None]
    assert one == pytest.approx(np.abs(independent - LAW).sum() / 2, abs=0.02)
    assert many < 0.04 < one


def timed(tokens, share):
    """A model that is told the time, and surer where more is masked."""
    return truth(tokens, share) * (0.2 + 1.6 * share[:, None, None])


def ancestral(steps):
    """The law of ancestral draws of `timed`, by every canvas and every step."""
    canvases = jnp.array(list(itertools.product(range(V + 1), repeat=N)))
    mass = np.zeros(len(canvases))
    mass[-1] = 1  # All masked.
    logits = jax.jit(timed)
    for number in range(steps):
        now, then = 1 - number / steps, 1 - (number + 1) / steps
        guess = logits(canvases, jnp.full(len(canvases), now))[..., :V]
        shown = (1 - then / now) * np.asarray(jax.nn.softmax(guess))
        moves = np.concatenate([shown, np.full((*shown.shape[:2], 1), then / now)], -1)
        masked = np.asarray(canvases == MASK)[..., None]
        moves = np.where(masked, moves, np.eye(V + 1)[np.asarray(canvases)])
        each = np.einsum("ca,cb,cd->cabd", *(moves[:, i] for i in range(N)))
        mass = mass @ each.reshape(len(canvases), -1)
    return mass.reshape((V + 1,) * N)[:V, :V, :V].ravel()


def test_first_hitting_is_ancestral_of_steps_without_end():
    """Also for a model that is told the time, which counting what is masked is not."""

    def found(show):
        run = jax.jit(functools.partial(sample, timed, mask_id=MASK, show=show))
        number = np.asarray(run(empty(ROWS), jax.random.key(2)).tokens)
        number = number @ V ** np.arange(N)[::-1]
        return np.bincount(number, minlength=V**N) / ROWS

    few, law = ancestral(6), 2 * ancestral(200) - ancestral(100)
    error = 4 * np.sqrt(law.clip(1e-4) / ROWS)
    assert (np.abs(found(FirstHitting()) - law) < error).all()
    assert (np.abs(found(Chance(6)) - few) < 4 * np.sqrt(few / ROWS)).all()
    assert (np.abs(found(Count(N, "random")) - law) > 1.5 * error).any()


def peaked(tokens, share):
    """A guess of 12 positions: the token of its number modulo 5, ever less surely."""
    T = tokens.shape[1]
    sure = 6.0 - 0.5 * jnp.arange(T)
    logits = jax.nn.one_hot(jnp.arange(T) % 5, 7) * sure[:, None]
    return jnp.broadcast_to(logits[None], (*tokens.shape, 7))


@pytest.mark.parametrize(
    ("show", "steps"),
    [
        (Count(4), 4),
        (Count(40), 12),
        (Above(0.9), 8),
        (Above(0.0), 1),
        (Above(1.1), 12),
        (Chance(5), 5),
    ],
    ids=str,
)
def test_how_many_steps_it_takes(show, steps):
    tokens = jnp.full((2, 12), 6)
    run = jax.jit(functools.partial(sample, peaked, mask_id=6, show=show, law=GREEDY))
    made = run(tokens, jax.random.key(0))
    assert made.steps <= steps and (made.tokens == jnp.arange(12)[None] % 5).all()
    if show != Chance(5):
        assert made.steps == steps
    if show == Count(4):  # The surest first, three a step.
        assert made.shown[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("show", [Count(4), Chance(4), FirstHitting()], ids=str)
def test_a_model_is_told_the_share_of_the_whole_canvas(show, block):
    """What is given counts, and so do blocks to come; by the time, what is expected."""
    told = []

    def heard(tokens, share):
        jax.debug.callback(lambda *x: told.append(x), (tokens == 6).mean(1)[0], share[0])
        return peaked(tokens, share)

    tokens = jnp.full((1, 12), 6).at[0, :4].set(1)
    sample(heard, tokens, jax.random.key(0), mask_id=6, show=show, block=block)
    jax.effects_barrier()
    shares = [float(share) for _, share in told]
    if show == Count(4):
        assert shares == [float(masked) for masked, _ in told]
    if show == Chance(
        4
    ):  # A block goes down in fourths of its own, 4 of 12, and may end early.
        wanted = np.arange(8, 0, -2 if block is None else -1) / 12
        assert all(np.abs(wanted - share).min() < 1e-6 for share in shares)
        assert shares[0] == pytest.approx(8 / 12)
    assert shares[0] <= 8 / 12 + 1e-6 and sorted(set(shares), reverse=True) == shares


def test_what_is_given_stays_wherever_it_stands():
    tokens = jnp.array([[6, 6, 3, 3, 6, 6, 6, 1], [2, 2, 6, 6, 6, 6, 2, 2]])
    made = sample(peaked, tokens, jax.random.key(0), mask_id=6, show=Count(2), law=GREEDY)
    given = tokens != 6
    assert (made.tokens[given] == tokens[given]).all() and (made.shown[given] == -1).all()
    assert (made.tokens == jnp.where(given, tokens, jnp.arange(8)[None] % 5)).all()
    assert (made.shown[~given] >= 0).all()


def test_blocks_are_filled_one_after_the_other():
    tokens = jnp.full((1, 12), 6).at[0, 5].set(1)
    made = sample(
        peaked, tokens, jax.random.key(0), mask_id=6, show=Count(2), block=4, law=GREEDY
    )
    assert made.shown[0].tolist() == [0, 0, 1, 1, 2, -1, 2, 3, 4, 4, 5, 5]


def test_a_batch_is_drawn_as_its_rows_alone():
    keys = jax.random.split(jax.random.key(0), 7)
    tokens = jnp.where(jax.random.uniform(keys[0], (7, 8)) < 0.7, 6, 2).at[:, 0].set(6)
    run = jax.jit(functools.partial(sample, peaked, mask_id=6, show=Above(0.6), block=4))
    together = run(tokens, keys)
    for i in range(7):
        alone = run(tokens[i : i + 1], keys[i : i + 1])
        assert (alone.tokens[0] == together.tokens[i]).all()


def test_nothing_follows_the_end():
    tokens = jnp.full((1, 12), 6).at[0, 3].set(5)
    run = functools.partial(sample, peaked, mask_id=6, law=GREEDY, end=5)
    made = run(tokens, jax.random.key(0), show=Count(12))
    assert made.tokens[0].tolist() == [0, 1, 2, 5] + [5] * 8 and made.steps == 3


def test_an_end_in_a_prompt_ends_nothing_and_one_that_is_early_waits():
    tokens = jnp.array([[5, 1, 6, 6, 6, 6, 6]])
    run = functools.partial(sample, mask_id=6, law=GREEDY, end=5)
    made = run(peaked, tokens, jax.random.key(0), show=Count(12))
    assert made.tokens[0].tolist() == [5, 1, 2, 3, 4, 0, 1]

    def backwards(tokens, share):
        """The surest is the last but one, an end, and the next ends too."""
        ids = jnp.array([0, 1, 2, 5, 4, 5, 1])
        logits = jax.nn.one_hot(ids, 7) * (1.0 + jnp.array([1.0, 1, 1, 3, 0.5, 4, 0]))[:, None]
        return jnp.broadcast_to(logits, (*tokens.shape, 7))

    made = run(backwards, jnp.full((1, 7), 6), jax.random.key(0), show=Count(7))
    assert made.tokens[0].tolist() == [0, 1, 2, 5, 5, 5, 5]
    assert made.shown[0, 5] == 0 and made.shown[0, 3] == 1 and made.shown[0, 6] > 1


SHOWS = [Count(4), Count(4, "margin"), Count(4, "entropy"), Above(0.9), Bound(0.1)]


@pytest.mark.parametrize("show", SHOWS, ids=str)
def test_a_model_that_gives_no_numbers_does_not_go_on_for_ever(show):
    tokens = jnp.array([[1, 2, 6, 6, 6, 6]])
    nothing = lambda tokens, share: jnp.full((*tokens.shape, 7), jnp.nan)  # noqa: E731
    made = sample(nothing, tokens, jax.random.key(0), mask_id=6, show=show, most=50)
    assert made.steps <= 4 and (made.tokens[0] != 6).all()


def test_a_bound_of_entropy_shows_as_many_as_fit_into_it():
    """Entropies rise with the place; the first is shown whatever it is."""
    logits = jax.nn.one_hot(jnp.arange(12) % 5, 7) * (8.0 - 0.5 * jnp.arange(12))[:, None]
    logits = jnp.where(jnp.arange(7) == 6, -jnp.inf, logits)
    entropies = np.asarray(jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1))
    nats = float(entropies[:4].sum() + 1e-4)
    made = sample(
        lambda tokens, share: jnp.broadcast_to(logits, (*tokens.shape, 7)),
        jnp.full((1, 12), 6), jax.random.key(0), mask_id=6, show=Bound(nats), law=GREEDY,
    )  # fmt: skip
    assert (made.shown[0] == 0).sum() == 5, "the sum before the fifth is that of four"


def test_guidance_of_none_is_none_and_more_is_more():
    tokens = jnp.array([[0, MASK, MASK]])
    given = tokens != MASK
    with_it, without = truth(tokens, None), truth(empty(1), None)
    for scale in (0.0, 1.5):
        found = guided(truth, given, scale, MASK)(tokens, jnp.ones(1))
        expected = without + (1 + scale) * (with_it - without)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_drawn_with_guidance_has_its_law():
    """Of two tokens in one step, each by its own logits."""
    tokens = jnp.array([[0, MASK, MASK]])
    sure = guided(truth, tokens != MASK, 1.5, MASK)(tokens, jnp.ones(1))[0, 1:, :V]
    law = np.asarray(jax.nn.softmax(sure))
    rows = jnp.tile(tokens, (ROWS, 1))
    denoise = guided(truth, rows != MASK, 1.5, MASK)
    run = jax.jit(functools.partial(sample, denoise, mask_id=MASK, show=Count(1)))
    made = np.asarray(run(rows, jax.random.key(0)).tokens)
    assert (made[:, 0] == 0).all()
    for i in range(2):
        found = np.bincount(made[:, 1 + i], minlength=V) / ROWS
        assert (np.abs(found - law[i]) < 4 * np.sqrt(law[i] * (1 - law[i]) / ROWS) + 1e-3).all()


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_what_is_ruled_out_stays_so_with_guidance(scale):
    banned = jnp.where(jnp.arange(7) == 2, -jnp.inf, 0.0)[None, None]
    with_it = guided(lambda *x: peaked(*x) + banned, jnp.zeros((1, 4), bool), scale, 6)
    found = with_it(jnp.full((1, 4), 6), jnp.ones(1))
    assert jnp.isneginf(found[..., 2]).all() and not jnp.isnan(found).any()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[6, 1, 2]], {"block": 2}, "block=2 must divide the canvas of 3 tokens"),
        ([[6, 1, 2]], {"block": 0}, "block=0 must divide the canvas of 3 tokens"),
        ([[6, 1, 2]], {"block": -3}, "block=-3 must divide the canvas of 3 tokens"),
        ([[6, 1], [1, 1]], {}, "row 1 has nothing masked: put mask_id=6"),
        ([[6, 1]], {"law": Law(repetition=1.2)}, "set repetition=1"),
    ],
)
def test_what_cannot_be_is_told(tokens, options, message):
    with pytest.raises(InputError, match=message):
        sample(
            peaked, jnp.array(tokens), jax.random.key(0), mask_id=6, show=Count(1), **options
        )
    with pytest.raises(InputError, match="steps=0 must be 1 or more"):
        Count(0)
    with pytest.raises(InputError, match="mask_id=7 is no token of the model, whose ids end"):
        sample(peaked, jnp.array([[7, 1]]), jax.random.key(0), mask_id=7, show=Count(1))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([6, 1], r"int32 of shape \(2,\) and must be int32 ids"), ([[6.0, 1.0]], "float32")],
)
def test_what_is_no_canvas_is_told(unchecked, tokens, message):
    with pytest.raises(InputError, match=message):
        sample(peaked, jnp.array(tokens), jax.random.key(0), mask_id=6, show=Count(1))


def test_the_tail_is_drawn_as_often_as_it_weighs():
    """A fifth of the mass, in entries of less than 1e-5; a step shows a few of many."""
    V, T = 50_000, 256
    head, tail = jnp.full(100, 0.8 / 100), jnp.full(V - 101, 0.2 / (V - 101))
    logits = jnp.log(jnp.concatenate([head, tail, jnp.ones(1)]))

    def guess(tokens, share):
        return jnp.broadcast_to(logits[None, None], (*tokens.shape, V))

    tokens = jnp.full((1, T), V - 1)
    run = functools.partial(sample, guess, mask_id=V - 1, show=Chance(50), most=10)
    made = jax.jit(run)(tokens, jax.random.key(0))
    seen = np.asarray(made.tokens[made.shown >= 0])
    assert 20 < len(seen) < T / 2
    assert abs((seen >= 100).mean() - 0.2) < 4 * np.sqrt(0.16 / len(seen))


def test_a_canvas_at_hand_is_looked_at_where_keys_are_traced():
    def run(tokens):
        how = {"mask_id": 6, "show": Count(1), "law": GREEDY}
        return jax.jit(lambda key: sample(peaked, tokens, key, **how))(jax.random.key(0))

    assert run(jnp.array([[6, 3]])).tokens.tolist() == [[0, 3]]
    with pytest.raises(InputError, match="row 0 has nothing masked"):
        run(jnp.array([[1, 3]]))
