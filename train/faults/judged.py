"""Models of four families, as they are drawn, judged by all processes there are.

`evaluation` begins `python -m train.faults.judged --json FILE`, with how the others are found.
"""

import argparse
import dataclasses
from typing import Any

import jax

from evaluate.__main__ import as_json
from evaluate.draw import Draw
from evaluate.drawn import Drawn
from evaluate.likelihood import Likelihood
from evaluate.retrieval import Retrieval
from evaluate.run import Trained, trained
from evaluate.vqa import VQA
from jaxformer import hosts
from jaxformer.data.glyphs import NamedGlyphs
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.rows import Windows
from jaxformer.data.scenes import Scenes
from jaxformer.data.sources import Digits
from jaxformer.data.text import Spell
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.tokens import Tokenized
from jaxformer.experiment import Experiment, Task, load
from jaxformer.objectives.next_token import NextToken
from jaxformer.program import entry, write_json
from jaxformer.samplers.ode import Ode
from train.faults.elastic import Numbered
from train.faults.meshes import experiment
from train.faults.processes import ROOT
from train.run import prepare

MESH = "data=4"


@dataclasses.dataclass(frozen=True)
class Judge:
    """Looks at digits as a ViT does that has learnt nothing."""

    normalize: Normalize
    name: str = "a ViT of no step"

    def check(self) -> None:
        """It is always there."""

    def load(self, mesh) -> tuple[Trained, tuple[Any, ...]]:
        """The ViT, on all devices."""
        return _begun(experiment("vit")), (self.normalize,)


@entry
def main(argv: list[str] | None = None) -> int:
    """Writes every sum and count of every family; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m train.faults.judged")
    parser.add_argument("--json", required=True)
    hosts.add_arguments(parser)
    args = parser.parse_args(argv)
    hosts.join_by(args)
    found = {}
    for made, *tasks in families():
        begun = _begun(made)
        for task in tasks:
            found[f"{type(made.model).__name__}/{type(task).__name__}"] = task.run(begun)
        jax.clear_caches()
    if jax.process_index() == 0:
        write_json(args.json, as_json(found))
    return 0


def families() -> list[tuple[Experiment, *tuple[Task, ...]]]:
    """Each with what judges it; no batch divides the records of any."""
    decoder, dit, vlm = (experiment(name) for name in ("decoder", "dit", "vlm"))
    windows = Windows(Tokenized(Numbered(101, "b"), Bytes()), 32, 16)
    normalize = Normalize(mean=0.5, std=0.5)
    named = Pipeline(NamedGlyphs("both", 8), (Spell(74), normalize))
    real = [Pipeline(Digits(split)) for split in ("train", "test")]
    drawn = Drawn(Draw((8, 8, 1), normalize, Ode(4)), Judge(normalize), *real, count=130)
    asked = Pipeline(Scenes("test", 101), vlm.evals["test"].transforms)
    # Nobody who learnt nothing gives whole answers, but some of their tokens.
    answers = NextToken(chunk=None, inputs=("tokens", "images", "shared"))
    return [
        (decoder, Likelihood(Pipeline(windows), NextToken(chunk=None))),
        (_clip(), Retrieval(named)),
        (dit, drawn),
        (vlm, VQA(asked, objective=answers), Likelihood(asked, answers)),
    ]


def _clip() -> Experiment:
    parts = [
        f"model.{part}.{x}"
        for part in ("vision", "text")
        for x in ("width=32", "depth=1", "mlp_dim=32", "num_heads=2")
    ]
    made = load(ROOT / "configs" / "clip_glyphs.py", [*parts, "model.size=(8,8)"])
    return dataclasses.replace(made, ema=None)


def _begun(made: Experiment) -> Trained:
    """A model with parameters as they are drawn, on all devices."""
    made = dataclasses.replace(made, mesh=MESH, evals={}, tasks={}, eval_batch_size=48)
    on = prepare(made)
    return trained(made, on, on.init(jax.random.key(0)).params)


if __name__ == "__main__":
    hosts.end(main())
