"""What raw pixels and bytes are worth: `python -m evaluate.baseline glyphs`, say.

k-nearest neighbours and logistic regression of scikit-learn, on the split that a config
trains and tests on, without augmentation: what a model has to beat. For text (`stdlib`), see
`compressors`; for questions about scenes of digits (`scenes`), see `ruled`.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from evaluate import compressors, ruled
from jaxformer.data.corpus import Stdlib
from jaxformer.data.glyphs import FAMILIES, Glyphs
from jaxformer.data.images import Normalize
from jaxformer.data.scenes import Scenes
from jaxformer.data.sources import Digits
from jaxformer.program import entry, write_json


def sources(name: str, held: str = "STIX") -> tuple[Digits | Glyphs, Digits | Glyphs]:
    """The training and the test split by name."""
    if name == "digits":
        return Digits("train"), Digits("test")
    return Glyphs("train", held=held), Glyphs("test", held=held)


def baselines(train: Digits | Glyphs, test: Digits | Glyphs) -> Iterator[dict]:
    """Fits each in turn; yields its name, right answers, count, top1 and seconds.

    The neighbours are by cosine: the nearest one, and 20 with votes that weigh
    `exp(cosine / 0.07)`, as `evaluate.knn` counts them. The regression runs to its end on
    pixels in [0, 1] with `C=1`: on glyphs that was the best of 0.1, 1 and 10, and better
    than on pixels scaled to variance 1.
    """

    votes: Any = _votes  # scikit-learn's types forget that it may be a function.

    x, labels = _arrays(train)
    new, truth = _arrays(test)
    for name, model in (
        ("1 nearest neighbour", KNeighborsClassifier(1, metric="cosine")),
        ("20 nearest neighbours", KNeighborsClassifier(20, metric="cosine", weights=votes)),
        ("logistic regression", LogisticRegression(max_iter=1000)),
    ):
        begin = time.monotonic()
        right = model.fit(x, labels).predict(new) == truth
        yield {
            "baseline": name,
            "right": int(right.sum()),
            "count": len(right),
            "top1": float(right.mean()),
            "seconds": time.monotonic() - begin,
        }


def _votes(distance: np.ndarray) -> np.ndarray:
    return np.exp((1 - distance) / 0.07)


def _arrays(source: Digits | Glyphs) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in [0, 1], one row an image, and labels."""
    normalize = Normalize()
    records = [normalize(source[i]) for i in range(len(source))]
    images = np.stack([record["image"].reshape(-1) for record in records])
    return images, np.array([record["label"] for record in records])


def texts() -> tuple[Stdlib, Stdlib]:
    """The training and the test split of text."""
    return Stdlib("train"), Stdlib("test")


def rows(name: str, held: str) -> Iterator[dict]:
    """Prints what there is and a line a baseline; yields each as a dict."""
    if name == "stdlib":
        train, test = texts()
        sizes = [sum(len(s[i]["text"].encode()) for i in range(len(s))) for s in (train, test)]
        print(
            f"stdlib: {sizes[0]} bytes of {len(train)} files to learn from, {sizes[1]} of "
            f"{len(test)} to test"
        )
        for row in compressors.baselines(train, test):
            bits = f"{row['bits_per_byte']:.4f} bits a byte"
            print(f"  {row['baseline']:<22} {bits}  {row['seconds']:.1f} s", flush=True)
            yield row
        return
    if name == "scenes":
        print("scenes: right answers of 1,000 to each kind of question")
        for row in ruled.baselines(Scenes("train", 5000), Scenes("test", 1000)):
            print(f"  {row['baseline']}")
            kinds = row["kinds"].items()
            print("    " + "  ".join(f"{k} {a / n:.4f}" for k, (a, n) in kinds), flush=True)
            yield row
        return
    train, test = sources(name, held)
    print(
        f"{name}{f', {held} held out' if name == 'glyphs' else ''}: {len(train)} images of "
        f"{train.num_classes} classes to learn from, {len(test)} to test"
    )
    for row in baselines(train, test):
        print(
            f"  {row['baseline']:<22} {row['top1']:.4f}  {row['right']} of {row['count']}"
            f"  {row['seconds']:.1f} s",
            flush=True,
        )
        yield row


@entry
def main(argv: list[str] | None = None) -> int:
    """Prints a line a baseline; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.baseline",
        description="Nearest neighbours and regression on pixels; xz and an n-gram on text.",
    )
    parser.add_argument("data", choices=("glyphs", "digits", "stdlib", "scenes"))
    parser.add_argument("--held", choices=tuple(FAMILIES), default="STIX", help="of glyphs")
    parser.add_argument("--json", help="a file for the same numbers")
    args = parser.parse_args(argv)
    made = list(rows(args.data, args.held))
    if args.json:
        held = args.held if args.data == "glyphs" else None
        found = {"data": args.data, "held": held}
        found |= {"machine": platform.machine(), "baselines": made}
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
