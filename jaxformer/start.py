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


@dataclass(frozen=True)
class Hub:
    """Those of a directory as Hugging Face saves it: what is under `of` goes under `into`.

    Both are paths of parameters, and "" is all. See `filled`.
    """

    path: str
    into: str = ""
    of: str = ""

    def read(self, params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
        """The parameters with those of the directory among them."""
        found = convert.load(self.path, mesh=mesh, rules=rules)[1]
        return filled(params, found, self.into, self.of, self.path)


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


def filled(params: PyTree, found: PyTree, into: str, of: str, where: str) -> PyTree:
    """`params` of which all under `into` are those that `found` has under `of`.

    Arrays may differ along one axis: layers or tokens that `params` does not have are left
    out, and those that `found` does not have stay as they are. What else `found` has is left
    out too.

    Raises:
      InputError: an array is not there or of other shape; all are listed.
    """
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    there: dict[str, Any] = traverse_util.flatten_dict(found, sep="/")
    wrong, own = [], [path for path in flat if not into or under(path, into)]
    for path in own:
        name = f"{of}/{path[len(into) :].lstrip('/')}".strip("/")
        old, new = flat[path], there.get(name)
        if new is None:
            wrong.append(f"- {name}")
        elif new.ndim != old.ndim or _apart(new, old) > 1:
            wrong.append(f"- {name} {tuple(old.shape)}\n+ {name} {tuple(new.shape)}")
        else:
            same = tuple(slice(min(a, b)) for a, b in zip(new.shape, old.shape, strict=True))
            new = new if new.shape == old.shape else jnp.asarray(old).at[same].set(new[same])
            flat[path] = jax.device_put(new.astype(old.dtype), old.sharding)
    if wrong or not own:
        raise InputError(
            f"{where}: does not fill what is under {into!r}; name other paths (- what is "
            "wanted, + what is there):\n" + "\n".join(wrong or [f"- {into}"])
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def _apart(a: Any, b: Any) -> int:
    """Along how many axes two arrays of one rank differ in size."""
    return sum(x != y for x, y in zip(a.shape, b.shape, strict=True))
