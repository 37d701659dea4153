"""A small decoder judged by texts: exact on any mesh, and its own words are its own."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate import baseline, complete, compressors
from evaluate.completions import Completions, function, opening, parses
from evaluate.generate import generate
from evaluate.harness import Harness
from evaluate.likelihood import Likelihood
from evaluate.run import Trained
from jaxformer.data.loader import Pipeline
from jaxformer.data.rows import Windows
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.tokens import Tokenized
from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.objectives.next_token import NextToken
from jaxformer.samplers.logits import GREEDY
from jaxformer.sharding import FSDP_TENSOR, make_mesh
from tests.data.texts import Texts
from tests.layers.test_block import randomized

MODEL = Decoder(vocab=258, width=16, depth=1, mlp_dim=16, num_heads=2)
TEXTS = Texts(("some text of a kind", "b", "and another one, é"))


@functools.cache
def params():
    tokens = jnp.zeros((1, 4), jnp.int32)
    return randomized(jax.jit(MODEL.init)(jax.random.key(0), tokens), jax.random.key(1))


def trained(devices=1, batch_size=4):
    mesh = make_mesh("", jax.devices()[:devices])
    return Trained(MODEL.apply, params(), mesh, FSDP_TENSOR, batch_size, MODEL)


@jax.jit
def logits(ids):
    return MODEL.apply({"params": params()}, ids)


def nats(ids, start=1, context=None):
    """Of ids from `start` on, each after at most so many; by all logits of each alone."""
    total, greedy = 0.0, True
    for i in range(start, len(ids)):
        seen = ids[max(0, i - (context or i)) : i]
        row = jnp.asarray([seen + [0] * (24 - len(seen))])
        found = logits(row)[0, len(seen) - 1]
        total -= float(jax.nn.log_softmax(found)[ids[i]])
        greedy &= int(found.argmax()) == ids[i]
    return total, greedy


def test_bits_of_every_byte_on_any_mesh():
    test = Pipeline(Windows(Tokenized(TEXTS, Bytes()), 24, 8))
    found = Likelihood(test, NextToken(chunk=5)).run(trained(8, 8))
    every = [[256, *t.encode(), 257] for t in TEXTS.texts]
    expected = sum(nats(ids)[0] for ids in every)
    assert found["loss"].count == sum(len(ids) - 1 for ids in every)
    assert found["bits_per_byte"].count == sum(len(t.encode()) for t in TEXTS.texts)
    assert found["loss"].sum == pytest.approx(expected, rel=1e-5)
    bits = expected / math.log(2) / found["bits_per_byte"].count
    assert found["bits_per_byte"].value() == pytest.approx(bits, rel=1e-5)


def test_what_is_generated_is_the_first_choice_each_time():
    prompts = [[256, 97], [256, 98, 99, 100], [256] * 40]
    made = generate(trained(), prompts, length=12, steps=4, law=GREEDY)
    for prompt, ids in zip(prompts, made, strict=True):
        assert len(ids) == 4
        for i in range(4):
            assert nats(prompt[-8:] + ids[: i + 1], len(prompt[-8:]) + i)[1]
    assert generate(trained(), [], length=12, steps=4) == []
    with pytest.raises(InputError, match="prompt 1 has no token"):
        generate(trained(), [[1], []], length=12, steps=4)
    with pytest.raises(InputError, match=r"prompt 1 has id 258, beyond model\.vocab=258; take"):
        generate(trained(), [[257], [1, 258]], length=12, steps=4)
    with pytest.raises(InputError, match="steps=12 leave no room for a prompt in length=12"):
        generate(trained(), prompts, length=12, steps=12)


@pytest.mark.slow
def test_what_is_drawn_goes_by_prompt_and_seed_alone():
    prompts = [[256, 97], [256, 98, 99, 100], [256] * 40]
    run = functools.partial(generate, length=12, steps=4)
    found = run(trained(), prompts, seed=3)
    assert run(trained(8, 8), prompts, seed=3) == found != run(trained(), prompts, seed=4)
    greedy = run(trained(), prompts, law=GREEDY)
    short = run(trained(), prompts, law=GREEDY, end=greedy[0][1])
    assert short[0] == greedy[0][: greedy[0].index(greedy[0][1])], "the end is left out"


CODE = '''import os

@cache
def first(a,
          b):
    """Doc.

    More."""
    x = [
]
    return a + b

def second(c):
    return c

y = 3
'''


def test_a_function_is_opened_and_closed():
    made = opening(CODE, "a.py")
    assert made is not None and made.before == "import os\n\n"
    assert made.start.startswith("@cache\ndef first(a,") and made.start.endswith('More."""\n')
    rest = CODE.removeprefix(made.before + made.start)
    text, whole = function(made.start + rest)
    assert whole and text.rstrip().endswith("return a + b") and parses(text)
    cut, whole = function(made.start + "    return a +\n    if b")
    assert not whole and cut.endswith("return a +\n") and not parses(cut)
    assert function("def f():\n    return 1\n# note\n    x\nz = 1\n")[0].count("\n") == 4
    assert opening("x = 3\n", "b.py") is None and opening("def f(:\n", "c.py") is None
    assert not parses("\0")


class Says:
    """A tokenizer of bytes that hears what it likes."""

    vocab, begin, end, lengths = 258, 256, 257, Bytes().lengths
    encode = staticmethod(Bytes().encode)
    said = ("    return 1\nx = 2\n", "    return (\n", "    pass\n")

    def decode(self, ids):
        self.said = (*self.said[1:], self.said[0])
        return self.said[-1]


def test_completions_that_parse_are_counted():
    source: Any = Texts(tuple(f"def f{i}(a):\n    b = a\n    return b\n" for i in range(3)))
    task = Completions(dataclasses.replace(source, texts=(*source.texts, "x")), Says(), 48, 8)
    task.check()
    found = task.run(trained())
    assert (found["parse"].sum, found["parse"].count) == (2, 3)
    assert found["parse"].value() == pytest.approx(2 / 3) and found["whole"].sum >= 1
    assert len(dataclasses.replace(task, files=2).openings()) == 2
    with pytest.raises(InputError, match="no document has a function to complete"):
        dataclasses.replace(task, test=Texts(("x",))).openings()
    with pytest.raises(InputError, match="steps=48 must be from 1 to 47"):
        dataclasses.replace(task, steps=48).check()


def test_a_config_without_completions_is_told(capsys):
    config = str(pathlib.Path(complete.__file__).parents[1] / "configs" / "vit_digits.py")
    assert complete.main([config, "--checkpoint", "none"]) == 2
    assert "has no task that is Completions; add one" in capsys.readouterr().err


@dataclasses.dataclass
class Request:
    """As the harness has them."""

    args: tuple


def test_the_harness_is_answered():
    """A task of two choices, one text and one question, with no package and no network."""
    judge = Harness(trained(), Bytes(), 24)
    pairs = [("2 + 2 =", " 4"), ("2 + 2 =", " fish"), ("", "ab"), ("x" * 40, "yz")]
    found = judge.loglikelihood([Request(pair) for pair in pairs])
    for (context, more), (value, greedy) in zip(pairs, found, strict=True):
        ids = [256, *context.encode(), *more.encode()][-24:]
        expected = nats(ids, len(ids) - len(more))
        assert value == pytest.approx(-expected[0], rel=1e-5) and greedy == expected[1]
    short, long = judge.loglikelihood_rolling([Request(("hello",)), Request(("a" * 60,))])
    assert short == pytest.approx(-nats([256, *b"hello"])[0], rel=1e-5)
    assert long < 0

    small = dataclasses.replace(trained(), model=MODEL.clone(vocab=257))
    with pytest.raises(InputError, match=r"has ids up to 257, but model\.vocab=257; take"):
        Harness(small, Bytes(), 24)
    with pytest.raises(InputError, match="'' adds no token to its context"):
        judge.loglikelihood([("a", "")])


@pytest.mark.slow
def test_the_harness_is_given_texts_up_to_a_stop():
    judge = Harness(trained(), Bytes(), 24)
    options = {"until": [], "max_gen_toks": 5}
    asked = [Request((text, options)) for text in ("ab", "c")]
    texts = judge.generate_until(asked)
    plain = generate(
        trained(), [[256, *b"ab"], [256, *b"c"]], length=24, steps=5, law=GREEDY, end=257
    )
    assert texts == [Bytes().decode(ids) for ids in plain]
    stopped = [Request((r.args[0], options | {"until": text[1:2]})) for r, text in
               zip(asked, texts, strict=True)]  # fmt: skip
    for text, cut in zip(texts, judge.generate_until(stopped), strict=True):
        assert cut == (text[: text.find(text[1])] if len(text) > 1 else text)


def test_an_ngram_is_a_law_and_learns():
    """Of all that may follow a context, be it known or not, the shares sum to 1."""
    train = [b"the cat sat on the mat", b"the dog sat", b"that cat"]
    for context in (b"the ", b"t", b"zz", b""):
        every = [context + bytes([i]) for i in range(256)]
        found = compressors.ngram(train, every, 3).reshape(256, -1)
        next_byte = np.exp(-found[:, len(context)]).sum()
        ends = compressors.ngram(train, [context], 3)
        assert next_byte + np.exp(-ends[-1]) == pytest.approx(1, abs=1e-6)
    known, other = (compressors.ngram(train, [t], 3).mean() for t in (b"the cat sat", b"qqqqq"))
    assert known < 2 < other
    longer = [compressors.ngram(train, train, order).sum() for order in (0, 1, 2, 4)]
    assert longer == sorted(longer, reverse=True)


def test_text_baselines_are_printed(tmp_path, capsys, monkeypatch):
    train, test = Texts(("some code " * 20,)), Texts(("some code " * 9, "else"))
    monkeypatch.setattr(baseline, "texts", lambda: (train, test))
    out = tmp_path / "out.json"
    assert baseline.main(["stdlib", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["baselines"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "stdlib: 200 bytes of 1 files to learn from, 94 of 2 to test"
    assert len(rows) == 3 == len(printed) - 1
    assert rows[1]["bits"] < rows[0]["bits"] and all(r["bytes"] == 94 for r in rows)
    assert f"{rows[2]['bits_per_byte']:.4f}" in printed[3]
