"""Writes captions.json: CIDEr-D of some captions by COCO's own code.

python -m tests.evaluate.record_captions, where pycocoevalcap can be imported (its scorer alone
needs numpy, and no Java). Texts are in small letters without punctuation, as its tokenizer
leaves them.
"""

import json
import pathlib

from pycocoevalcap.cider.cider_scorer import CiderScorer

FILE = pathlib.Path(__file__).with_name("captions.json")
MADE = [
    "a cat sits on a mat",
    "two dogs run on the beach with a red ball",
    "a man",
    "a plate of food on a table",
    "a cat a cat a cat a cat",
    "people",
]
REFERENCES = [
    ["a cat sits on a mat", "a black cat on a small mat", "the cat is sitting on the mat"],
    ["two dogs play with a ball on a beach", "dogs run along the sea"],
    ["a man rides a wave on a surfboard", "a surfer in the sea", "a man in the sea on a board"],
    ["a table with plates of food", "a plate of food on a wooden table", "some food"],
    ["a cat lies on a couch", "a grey cat sleeps"],
    ["an empty street at night", "a street with lamps and no one in it"],
]

if __name__ == "__main__":
    scorer = CiderScorer()
    for text, texts in zip(MADE, REFERENCES, strict=True):
        scorer += (text, texts)
    found = {"made": MADE, "references": REFERENCES}
    FILE.write_text(json.dumps(found | {"cider": scorer.compute_score()[1].tolist()}, indent=1))
