"""Text to ids and back without loss, and what a tokenizer says of itself."""

import pickle

import numpy as np
import pytest

from jaxformer.data.tokenizer import Bytes, Learned, TokenizerFile, learn
from tests.data.texts import Texts

CODE = Texts(("def add(a, b):\n    return a + b\n" * 9, "class Été:\n    '<|end|>'\n" * 5))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    name = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    learn(CODE, 280).save(name)
    return name


def tokenizers(path):
    return (Bytes(), Learned(CODE, 280), TokenizerFile(path, "<|begin|>", "<|end|>"))


def test_texts_come_back_and_their_bytes_are_counted(path):
    for tokenizer in tokenizers(path):
        for text in (*CODE.texts, "ünseen <|begin|> 日本\t\n"):
            (ids,) = tokenizer.encode([text])
            assert tokenizer.decode(ids) == text and ids.max() < tokenizer.vocab
            assert tokenizer.lengths[ids].sum() == len(text.encode())
            assert not {tokenizer.begin, tokenizer.end} & set(ids.tolist()), "marks are none"
        marks = [tokenizer.begin, tokenizer.end]
        assert tokenizer.lengths.shape == (tokenizer.vocab,)
        assert not tokenizer.lengths[marks].any() and len(set(marks)) == 2


def test_a_learned_tokenizer_is_shorter_and_the_same_each_time(path):
    with open(path) as file:
        assert learn(CODE, 280).to_str(pretty=True) == file.read()
    texts = CODE.texts
    own, plain = (sum(map(len, t.encode(texts))) for t in (Learned(CODE, 280), Bytes()))
    assert own < 0.7 * plain
    again = pickle.loads(pickle.dumps(Learned(CODE, 280)))
    assert again.encode(texts)[0].tolist() == Learned(CODE, 280).encode(texts)[0].tolist()


def test_a_tokenizer_that_is_not_on_bytes_counts_what_is_spelled(tmp_path):
    import tokenizers

    words = {"<unk>": 0, "\u2581the": 1, "<0x0A>": 2, "é": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    name = str(tmp_path / "words.json")
    made.save(name)
    found = TokenizerFile(name, None, "</s>")
    assert found.lengths.tolist()[1:] == [4, 1, 2, 0]
    assert (found.begin, found.end, found.vocab) == (None, 4, 5)


def test_bad_tokenizers_are_told(path, tmp_path):
    from jaxformer.errors import InputError

    with pytest.raises(InputError, match=r"has no token '<\|endoftext\|>'; name its own"):
        _ = TokenizerFile(path).end
    with pytest.raises(InputError, match=r"none\.json: is no tokenizer\.json"):
        _ = TokenizerFile(str(tmp_path / "none.json")).vocab
    with pytest.raises(InputError, match="vocab=99 must be 258 or more"):
        learn(CODE, 99)
    with pytest.raises(InputError, match=r"the texts yield \d+ tokens and vocab=900 asks"):
        learn(CODE, 900)
    with pytest.raises(InputError, match="ids must be from 0 to 257"):
        Bytes().decode(np.array([3, 258]))
