"""What raw pixels are worth: `python -m evaluate.baseline glyphs`.

k-nearest neighbours and logistic regression of scikit-learn, on the split that a config
trains and tests on, without augmentation: what a model has to beat.
"""

import argparse
import json
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from jaxformer.data.glyphs import FAMILIES, Glyphs
from jaxformer.data.images import Normalize
from jaxformer.data.sources import Digits
from jaxformer.errors import InputError


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


def main(argv: list[str] | None = None) -> int:
    """Prints a line a baseline; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.baseline",
        description="k-nearest neighbours and logistic regression on raw pixels.",
    )
    parser.add_argument("data", choices=("glyphs", "digits"))
    parser.add_argument("--held", choices=tuple(FAMILIES), default="STIX", help="of glyphs")
    parser.add_argument("--json", help="a file for the same numbers")
    args = parser.parse_args(argv)
    try:
        train, test = sources(args.data, args.held)
        held = f", {args.held} held out" if args.data == "glyphs" else ""
        print(
            f"{args.data}{held}: {len(train)} images of {train.num_classes} classes to learn "
            f"from, {len(test)} to test"
        )
        rows = []
        for row in baselines(train, test):
            rows.append(row)
            print(
                f"  {row['baseline']:<22} {row['top1']:.4f}  {row['right']} of {row['count']}"
                f"  {row['seconds']:.1f} s",
                flush=True,
            )
        if args.json:
            found = {"data": args.data, "held": args.held if held else None}
            found |= {"machine": platform.machine(), "baselines": rows}
            path = pathlib.Path(args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        print(f"error: {error}; name another place to write to", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
