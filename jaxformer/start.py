"""What a run begins with where that is not drawn: parameters of files.

`Experiment.start` is a tuple of these, and each changes the parameters in turn.
"""

import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxformer import checkpoint, convert
from jaxformer.errors import InputError
from jaxformer.optim import under
from jaxformer.sharding import Rules

Apart = tuple[tuple[str, int], ...]  # A path of parameters, and an axis of them.


@dataclass(frozen=True)
class Hub:
    """Those of a directory as Hugging Face saves it: what is under `of` goes under `into`.

    Both are paths of parameters, and "" is all. `apart` are those under `into` that may be
    longer or shorter than the directory's, each with the axis. See `filled`.
    """

    path: str
    into: str = ""
    of: str = ""
    apart: Apart = ()

    def read(self, params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
        """The parameters with those of the directory among them."""
        found = convert.load(self.path, mesh=mesh, rules=rules)[1]
        return filled(params, found, self.into, self.of, self.path, self.apart)


@dataclass(frozen=True)
class Run:
    """Those of the last checkpoint of another run with the same model."""

    path: str

    def read(self, params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
        """The parameters of the run."""
        folder = checkpoint.find(pathlib.Path(self.path))
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        step = checkpoint.steps(folder)[-1]
        found: Any = checkpoint.restore(folder, step, {"state": {"params": target}}, part=True)
        return found["state"]["params"]


def filled(
    params: PyTree, found: PyTree, into: str, of: str, where: str, apart: Apart = ()
) -> PyTree:
    """`params` of which all under `into` are those that `found` has under `of`.

    Arrays have the same shape, but along the axes that `apart` names for what is under a
    path: layers or tokens that `params` does not have are left out, and those that `found`
    does not have stay as they are. What else `found` has is left out too.

    Raises:
      InputError: an array is not there or of other shape, or a path of `apart` has none;
        all are listed.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    there: dict[str, Any] = traverse_util.flatten_dict(found, sep="/")
    own = {
        path: path[len(into) :].lstrip("/") for path in flat if not into or under(path, into)
    }
    missing = {
        f"{into}/{x}".strip("/") for x, _ in apart if not any(under(p, x) for p in own.values())
    }
    wrong = [f"- {name}" for name in sorted(missing)]
    for path, rest in own.items():
        name = f"{of}/{rest}".strip("/")
        old, new = flat[path], there.get(name)
        axes = {axis for part, axis in apart if under(rest, part)}
        if new is None:
            wrong.append(f"- {name}")
        elif new.ndim != old.ndim or _apart(new, old) - axes:
            wrong.append(f"- {name} {tuple(old.shape)}\n+ {name} {tuple(new.shape)}")
        else:
            same = tuple(slice(min(a, b)) for a, b in zip(new.shape, old.shape, strict=True))
            new = new if new.shape == old.shape else jnp.asarray(old).at[same].set(new[same])
            flat[path] = jax.device_put(new.astype(old.dtype), old.sharding)
    if wrong or not own:
        raise InputError(
            f"{where}: does not fill what is under {into!r}; name other paths, or in `apart` "
            "the axes that may differ (- what is wanted, + what is there):\n"
            + "\n".join(wrong or [f"- {into}"])
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def _apart(a: Any, b: Any) -> set[int]:
    """The axes along which two arrays of one rank differ in size."""
    return {i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y}
