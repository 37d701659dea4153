"""`python -m evaluate.unmasking CONFIG.py --checkpoint DIR`: how a model fills what is masked.

Draws holes of the config's task `Infill`: a PNG of tokens coloured by the step that showed
them, and a page of HTML that shows them one step after the other.
"""

import argparse
import dataclasses
import html
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from jaxtyping import Int
from matplotlib.patches import Rectangle

from evaluate.infill import Infill
from evaluate.run import restored, trained
from jaxformer import checkpoint
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.program import entry, writing

WIDTH = 100  # letters a line.
DPI, PIXELS = 144, 10  # of a letter: all stand where they should if that is a whole number.
FONT = PIXELS * 72 / DPI / (1233 / 2048)  # points; DejaVu Sans Mono is that wide.


class Piece(NamedTuple):
    """A token's text, and the step that showed it, -1 if it was given."""

    text: str
    step: int


def pieces(ids: Int[Any, " T"], shown: Int[Any, " T"], tokenizer: Any) -> list[Piece]:
    """Each token by itself; of a letter of several bytes in several tokens, a mark each."""
    return [Piece(tokenizer.decode([i]), int(step)) for i, step in zip(ids, shown, strict=True)]


def picture(found: Sequence[Piece], path: str | pathlib.Path) -> pathlib.Path:
    """Draws a text with tokens coloured by their steps, as a PNG; early ones are dark."""
    last = max((piece.step for piece in found), default=0)
    runs = list(_lines(found))
    rows = max((row for row, *_ in runs), default=0) + 2
    size = (WIDTH * PIXELS / DPI, rows * 2.2 * PIXELS / DPI)
    figure = plt.figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(rows, 0))
    axis.set_axis_off()
    colors = matplotlib.colormaps["viridis"]
    for row, column, text, step in runs:
        ink = "0.45"
        if step >= 0:
            color = colors(step / max(last, 1))
            box = Rectangle((column, row), len(text), 0.95, color=color, lw=0)
            axis.add_patch(box)
            ink = "white" if step < 0.6 * last else "black"
        axis.text(
            column,
            row + 0.75,
            text.replace("$", r"\$"),
            family="DejaVu Sans Mono",
            size=FONT,
            color=ink,
        )
    for step in range(last + 1):  # The scale, in the last line.
        width = WIDTH / 2 / (last + 1)
        left = WIDTH / 4 + step * width
        axis.add_patch(
            Rectangle((left, rows - 0.9), width, 0.6, color=colors(step / max(last, 1)))
        )
    for column, side, text in ((WIDTH / 4 - 1, "right", "step 1"),
                               (WIDTH * 3 / 4 + 1, "left", f"step {last + 1}")):  # fmt: skip
        axis.text(column, rows - 0.35, text, size=FONT, ha=side, family="DejaVu Sans Mono")
    path = pathlib.Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _lines(found: Sequence[Piece]):
    """(row, column, text, step) of what each token has on each line."""
    row = column = 0
    for text, step in found:
        for number, part in enumerate(text.expandtabs(4).split("\n")):
            if number:
                row, column = row + 1, 0
            while part:
                if column == WIDTH:
                    row, column = row + 1, 0
                head, part = part[: WIDTH - column], part[WIDTH - column :]
                yield row, column, head, step
                column += len(head)


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>unmasking</title>
<style>
pre {{ font: 13px/1.35 monospace; color: #777; white-space: pre-wrap }}
pre span {{ color: #fff; background: hsl(calc(260 - 200 * var(--s) / {last}), 60%, 38%) }}
pre span.masked {{ color: transparent; background: #ddd }}
</style>
<p><button onclick="play()">play</button>
<input type="range" id="step" min="0" max="{steps}" value="{steps}" oninput="show()">
step <output id="at"></output> of {steps}</p>
<pre>{text}</pre>
<script>
const range = document.getElementById("step"), tokens = document.querySelectorAll("pre span");
function show() {{
  document.getElementById("at").textContent = range.value;
  for (const t of tokens)
    t.classList.toggle("masked", +t.style.getPropertyValue("--s") >= +range.value);
}}
function play() {{
  range.value = 0;
  const timer = setInterval(() => {{
    show();
    if (+range.value >= {steps}) clearInterval(timer); else range.value = +range.value + 1;
  }}, 250);
}}
show();
</script>
"""


def animation(found: Sequence[Piece], path: str | pathlib.Path) -> pathlib.Path:
    """Writes a page, without a need of any other, that shows tokens as they were shown."""
    last = max((piece.step for piece in found), default=0)
    spans = []
    for text, step in found:
        quoted = html.escape(text)
        spans.append(quoted if step < 0 else f'<span style="--s:{step}">{quoted}</span>')
    path = pathlib.Path(path).with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    page = PAGE.format(last=max(last, 1), steps=last + 1, text="".join(spans))
    path.write_text(page, encoding="utf-8")
    return path


@entry
def main(argv: list[str] | None = None) -> int:
    """Draws; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m evaluate.unmasking")
    parser.add_argument("config", help="the config that the run was trained with")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.depth=8")
    parser.add_argument("--checkpoint", required=True, help="a run's directory")
    parser.add_argument("--step", type=int, help="default: the last")
    parser.add_argument("--count", type=int, default=4, help="how many to draw")
    parser.add_argument("--pictures", help="default: evaluation/ in the run's directory")
    args = parser.parse_intermixed_args(argv)
    experiment = load(args.config, args.overrides)
    tasks = [t for t in experiment.tasks.values() if isinstance(t, Infill)]
    tasks = [t for t in tasks if t.mask_id is not None]
    if not tasks:
        raise InputError(f"{args.config}: has no task that is Infill with a mask_id; add one")
    task = dataclasses.replace(tasks[0], count=args.count)
    _, made, params = restored(experiment, args.checkpoint, args.step)
    filled = task.unmask(trained(experiment, made, params), task.holes())
    beside = checkpoint.find(args.checkpoint).parent / "evaluation"
    folder = pathlib.Path(args.pictures or beside)
    for number, (ids, shown) in enumerate(zip(*filled, strict=True)):
        found = pieces(ids, shown, task.tokenizer)
        for draw in (picture, animation):
            with writing():
                print(draw(found, folder / f"unmasking_{number}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
