"""The same losses on every mesh: a table of shapes by families, on 8 devices."""

import contextlib
import dataclasses

import jax
import numpy as np

from jaxformer.data.loader import Pipeline, to_mesh, train_batches
from jaxformer.data.rows import Rows
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.tokens import Tokenized
from jaxformer.experiment import Experiment, arguments, load
from jaxformer.models.decoder import Decoder
from jaxformer.objectives.next_token import NextToken
from jaxformer.setup import setup
from train.faults.elastic import Numbered
from train.faults.processes import ROOT
from train.faults.row import Row, wrongs

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "data=4,fsdp=2",
    "data=2,fsdp=4",
    "data=4,tensor=2",
    "data=2,tensor=4",
    "fsdp=4,tensor=2",
    "fsdp=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
    "data=4,seq=2",
    "fsdp=2,tensor=2,seq=2",
)
FAMILIES = ("vit", "decoder", "dit", "vlm")
STEPS = 5
CLOSE = 1e-5
# 8 heads, one for each device; classes and words are not of a number that 8 divides.
_SMALL = ("depth=2", "num_heads=8", "width=64")
_WHOLE = ("vocab", "act_vocab")


def same_losses(
    families: tuple[str, ...] = FAMILIES, meshes: tuple[str, ...] = MESHES, say=print
) -> Row:
    """Trains each family on each mesh, and on one device."""
    apart: dict[str, dict[str, float]] = {}
    for family in families:
        made = experiment(family)
        one = losses(made, "data=1")
        apart[family] = {}
        for mesh in meshes:
            found = losses(made, mesh)
            apart[family][mesh] = float(np.abs(found / one - 1).max())
            say(f"{family:8} {mesh:24} {apart[family][mesh]:.1e}")
            jax.clear_caches()
    worst = {family: max(some.values()) for family, some in apart.items()}
    told = ", ".join(f"{family} {value:.1e}" for family, value in worst.items())
    return Row(
        f"meshes: {len(meshes)} shapes by {len(families)} families on 8 devices",
        f"losses of {STEPS} steps differ from those of one device by at most {told}",
        wrongs(**{f"{f}_is_equal_to_1e_5": value <= CLOSE for f, value in worst.items()}),
        {"apart": apart, "steps": STEPS},
    )


def losses(made: Experiment, mesh: str) -> np.ndarray:
    """Of the first steps, on as many devices as a mesh has."""
    count = int(np.prod([int(part.split("=")[1]) for part in mesh.split(",")]))
    made = dataclasses.replace(made, mesh=mesh)
    with contextlib.closing(
        train_batches(made.data, batch_size=made.batch_size, seed=0)
    ) as data:
        batches = [next(data) for _ in range(STEPS)]
    inputs = arguments(made.objective, batches[0])
    on = setup(made, inputs, jax.devices()[:count])
    key = jax.random.key(0)
    state, found = on.init(key), []
    for batch in batches:
        state, metrics = on.step(state, to_mesh(batch, on.batch), key)
        found.append(float(metrics["loss"]))  # Waits: one program at a time.
    return np.array(found)


def experiment(family: str) -> Experiment:
    """One of `FAMILIES`, tiny, in float32 and by its own objective."""
    if family == "decoder":
        return _decoder()
    config, model = {
        "vit": ("vit_digits", [f"model.{x}" for x in (*_SMALL, "mlp_dim=128")]),
        "dit": ("dit_digits", [f"model.{x}" for x in _SMALL]),
        "vlm": (
            "vlm_digits",
            [f"model.{part}.{x}" for part in ("vision", "language") for x in _SMALL]
            + ["data.transforms.2.length=58"],
        ),
    }[family]
    made = load(ROOT / "configs" / f"{config}.py", [*model, "batch_size=16", "steps=50"])
    return dataclasses.replace(made, replicate=_WHOLE, ema=None)


def _decoder() -> Experiment:
    tokens = Tokenized(Numbered(200, "a"), Bytes())
    model = Decoder(vocab=tokens.vocab, width=64, depth=2, mlp_dim=128, num_heads=8)
    return dataclasses.replace(
        experiment("vit"),
        model=model,
        objective=NextToken(chunk=None),
        data=Pipeline(Rows(tokens, 32)),
        flops=None,
    )
