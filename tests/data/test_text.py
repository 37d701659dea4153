"""Letters to tokens and back."""

import numpy as np
import pytest

from jaxformer.data.text import ALPHABET, VOCAB, Caption, Spell, Tokenize, decode, encode
from jaxformer.errors import InputError


@pytest.mark.parametrize(
    "text", ["", "A", "LATIN SMALL LETTER A WITH RING", "U-00E9", ALPHABET]
)
def test_decoding_gives_back_what_was_encoded(text):
    tokens = encode(text, 50)
    assert tokens.shape == (50,) and tokens.dtype == np.int32
    assert decode(tokens) == text and tokens.max() < VOCAB == 40
    assert tokens[len(text)] == 1 and not tokens[len(text) + 1 :].any()
    assert encode(text, len(text) + 1)[-1] == 1


def test_every_letter_has_a_token_of_its_own():
    assert encode(ALPHABET, 39).tolist() == [*range(2, 40), 1]
    assert encode("A-B", 6).tolist() == [14, 3, 15, 1, 0, 0]


def test_spell_replaces_the_text():
    record = {"text": "CAT", "label": 3}
    spelled = Spell(8)(record)
    assert spelled.keys() == {"label", "tokens"} and record["text"] == "CAT"
    assert decode(spelled["tokens"]) == "CAT"


def test_a_class_has_its_name_and_none_has_nothing_real():
    names = Caption(("ZERO", "ONE"), 6)
    record = {"label": 1, "source": "digits[7]"}
    told = names(record)
    assert decode(told["tokens"]) == "ONE" and told["real"].tolist() == 4 * [True] + 2 * [False]
    assert told["label"] == 1 and record.keys() == {"label", "source"}
    tokens, real = names.table
    assert [decode(row) for row in tokens] == ["ZERO", "ONE", ""]
    assert real.sum(1).tolist() == [5, 4, 0]
    with pytest.raises(InputError, match=r"digits\[7\]: class 3 has none of the 2 names"):
        names(record | {"label": 3})


def test_bad_input_is_told_in_one_sentence():
    with pytest.raises(
        InputError, match="'cat': 'c' is no letter of Unicode's names; use A to"
    ):
        encode("cat", 8)
    with pytest.raises(
        InputError, match="3 letters and an end do not go into length=3; give 4"
    ):
        encode("CAT", 3)
    with pytest.raises(InputError, match="token 40 is not one of the 40, 0 to 39"):
        decode(np.array([2, 40]))


def test_a_tokenizers_file_makes_tokens(tmp_path):
    import tokenizers

    words = {"[UNK]": 0, "a": 5, "cat": 6, "sat": 7}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = str(tmp_path / "tokenizer.json")
    made.save(path)
    record = {"text": "a cat sat", "label": 3}
    found = Tokenize(path, 5, pad=9, end=1)(record)
    assert found["tokens"].tolist() == [5, 6, 7, 1, 9] and found["label"] == 3
    assert Tokenize(path, 2, end=1)(record)["tokens"].tolist() == [5, 1]
    with pytest.raises(InputError, match=r"none\.json: is no tokenizer\.json"):
        Tokenize(str(tmp_path / "none.json"), 5)(record)
