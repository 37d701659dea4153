"""Holes in functions: what is hidden, what is filled in, and how it is judged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate.infill import Infill, similarity, statements
from evaluate.run import Trained
from jaxformer.data.tokenizer import Bytes
from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.models.mdlm import denoiser
from jaxformer.samplers.unmask import sample
from jaxformer.sharding import FSDP_TENSOR, make_mesh
from tests.data.texts import Texts
from tests.layers.test_block import randomized

CODE = '''"""é, and a function of four statements."""

def first(a):
    b = "é"
    if b:
        a = [
            b]
    c = 1; d = 2
    return a

class Some:
    def second(self):
        x = 1
        y = x
        return y
'''
MASK = 258
SIZES = {"vocab": 259, "width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2}
HOLES = Infill(Texts((CODE, "x = 1\n", CODE.replace("y = x", "y = 2"))), Bytes(), 64, most=20)


@functools.cache
def trained(causal):
    model = Decoder(**SIZES, causal=causal)
    drawn = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = randomized(drawn, jax.random.key(1))
    mesh = make_mesh("", jax.devices()[:1])
    return Trained(model.apply, params, mesh, FSDP_TENSOR, 2, model)


def test_statements_are_whole_lines_within_functions():
    data = CODE.encode()
    found = [data[low:high].decode() for low, high in statements(CODE)]
    assert found == ["    if b:\n        a = [\n            b]\n", "        y = x\n"]
    assert statements("def f(:\n") == [] and statements("x = 1\n") == []


def test_similarity_is_one_less_the_edits_by_the_longer():
    @functools.cache
    def edits(a, b):
        if not a or not b:
            return len(a) + len(b)
        change = edits(a[1:], b[1:]) + (a[0] != b[0])
        return min(change, edits(a[1:], b) + 1, edits(a, b[1:]) + 1)

    words = ["kitten", "sitting", "", "a", "abcabc", "cab", "é"]
    for a in words:
        for b in words:
            expected = 1 - edits(a, b) / max(len(a), len(b), 1)
            assert similarity(a, b) == pytest.approx(expected)


def test_what_is_hidden_is_the_same_for_all():
    holes = HOLES.holes()
    assert [Bytes().decode(h.ids[h.start : h.stop]) for h in holes] == [
        "        y = x\n",
        "        y = 2\n",
    ]
    masked = dataclasses.replace(HOLES, mask_id=MASK)
    canvas, at = masked.canvas(holes[0])
    count = holes[0].stop - holes[0].start
    assert len(canvas) == 64 and (canvas == MASK).sum() == count
    assert (canvas[at : at + count] == MASK).all()
    # To the end of the file, where there is less behind than half of the canvas.
    np.testing.assert_array_equal(canvas[at + count :], holes[0].ids[holes[0].stop :])
    np.testing.assert_array_equal(canvas[:at], holes[0].ids[holes[0].start - at :][:at])
    assert len(dataclasses.replace(HOLES, count=1).holes()) == 1


@pytest.mark.parametrize("before", [0.5, 1.0])
def test_a_hole_begins_where_a_block_does_if_the_file_has_room(before):
    task = dataclasses.replace(HOLES, mask_id=MASK, before=before)
    for align in (5, 16):
        aligned = dataclasses.replace(task, align=align)
        aligned.check()
        for hole in task.holes():
            moved = []
            for spare in (0, 40):  # More of the file after the hole.
                longer = hole._replace(ids=np.pad(hole.ids, (0, spare)))
                canvas, at = aligned.canvas(longer)
                truth = longer.ids[hole.start - at :][:64]
                known = np.delete(np.arange(64), np.arange(at, at + 14))
                np.testing.assert_array_equal(canvas[known], truth[known])
                assert (canvas[at : at + 14] == MASK).all()
                moved.append((task.canvas(longer)[1] - at, at % align))
            assert min(moved)[0] >= 0 and max(moved)[0] < align and moved[1][1] == 0


class Says(Infill):
    """Fills in what a function makes of the truth."""

    def fill(self, trained):
        return [(h, self.says(h.ids[h.start : h.stop])) for h in self.holes()]


@pytest.mark.parametrize(
    ("says", "exact", "parse", "similar"),
    [
        (lambda ids: ids, 2, 2, 2.0),
        (lambda ids: np.where(ids == ord("y"), ord("z"), ids), 0, 2, 2 * (1 - 1 / 14)),
        (lambda ids: np.where(ids == ord("="), ord("("), ids), 0, 0, 2 * (1 - 1 / 14)),
        (lambda ids: ids[:0], 0, 2, 0.0),
    ],
    ids=["the truth", "another name", "no Python", "nothing"],
)
def test_what_is_filled_in_is_judged(says, exact, parse, similar, monkeypatch):
    monkeypatch.setattr(Says, "says", staticmethod(says), raising=False)
    fields = {f.name: getattr(HOLES, f.name) for f in dataclasses.fields(HOLES)}
    found = Says(**fields).run(None)
    assert {m.count for m in found.values()} == {2}
    assert (found["exact"].sum, found["parse"].sum) == (exact, parse)
    assert found["similarity"].sum == pytest.approx(similar)


@pytest.mark.parametrize("block", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_a_model_that_unmasks_fills_the_hole_alone(block):
    task = dataclasses.replace(HOLES, mask_id=MASK, block=block)
    task.check()
    holes = task.holes()
    tokens, steps = task.unmask(trained(False), holes)
    for hole, row, shown in zip(holes, tokens, steps, strict=True):
        canvas, _ = task.canvas(hole)
        np.testing.assert_array_equal(shown >= 0, canvas == MASK)
        np.testing.assert_array_equal(row[shown < 0], canvas[shown < 0])
        assert (row < MASK).all() and sorted(shown[shown >= 0]) == [*range(14)]
    again = task.fill(trained(False))
    for (hole, ids), row in zip(again, tokens, strict=True):
        at = task.canvas(hole)[1]
        np.testing.assert_array_equal(ids, row[at : at + 14])


def test_guesses_that_stand_one_token_before_are_taken_there():
    task = dataclasses.replace(HOLES, mask_id=MASK, shift=True)
    judged = trained(False)
    found, _ = task.unmask(judged, task.holes())
    canvases = jnp.asarray([task.canvas(hole)[0] for hole in task.holes()])
    denoise = denoiser(judged.model, judged.params, shift=True)
    how = {"mask_id": MASK, "show": task.show, "law": task.law}
    expected = jax.jit(functools.partial(sample, denoise, **how))(canvases, jax.random.key(0))
    np.testing.assert_array_equal(found, expected.tokens)
    assert (
        found != dataclasses.replace(task, shift=False).unmask(judged, task.holes())[0]
    ).any()


def test_a_model_of_the_next_token_goes_on_for_as_long():
    found = dataclasses.replace(HOLES, most=16).fill(trained(True))
    assert [len(ids) for _, ids in found] == [14, 14]


def test_what_does_not_fit_is_told():
    with pytest.raises(InputError, match="most=64 must be from 1 to 63"):
        dataclasses.replace(HOLES, most=64).check()
    for name, value in (("before", 1.5), ("before", -0.5), ("count", 0)):
        with pytest.raises(InputError, match=f"{name}={value} must be"):
            dataclasses.replace(HOLES, **{name: value}).check()
    with pytest.raises(InputError, match="align=0 must be 1 token or more"):
        dataclasses.replace(HOLES, align=0).check()
    with pytest.raises(InputError, match="block=5 must divide length=64"):
        dataclasses.replace(HOLES, block=5).check()
    with pytest.raises(InputError, match="no document of 64 tokens has a statement of 3"):
        dataclasses.replace(HOLES, most=3).holes()
    with pytest.raises(InputError, match="has no mask; set mask_id"):
        HOLES.unmask(trained(True), HOLES.holes())
