"""Who computes an attention: the one place where a platform meets its kernels."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from jaxformer.kernels import flash_gpu, flash_tpu, flash_tpu_backward
from jaxformer.kernels.case import Case
from jaxformer.ops import chunked, cudnn, dense
from jaxformer.ops.mask import Mask

Impl = Literal["auto", "reference", "chunked", "tpu", "gpu", "cudnn"]
IMPLS: tuple[str, ...] = get_args(Impl)
XLA = {"reference": dense, "chunked": chunked}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The two functions of `kernels.case`, and the platform that they run on."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    home: str


KERNELS = {
    "tpu": Kernel(flash_tpu.forward, flash_tpu_backward.backward, "tpu"),
    "gpu": Kernel(flash_gpu.forward, flash_gpu.backward, "cuda"),
}
# What "auto" tries, by the platform that is compiled for; then XLA.
ORDER = {"tpu": ("tpu",), "cuda": ("cudnn", "gpu")}

# Above so many logits a head, "auto" leaves the path that holds them all at once.
DENSE_LOGITS = 1024 * 1024
# The same on an accelerator, where kernels serve all that is not tiny.
DENSE_LOGITS_ON_DEVICE = 128 * 128


@dataclasses.dataclass(frozen=True)
class How:
    """What was asked for, beside the case; all of it is known before compiling.

    `causal`: the case's intervals are those of `Causal()`. `lse`: someone looks at the
    logsumexp. `why_not`: the reason that no kernel may be used, if there is one.
    """

    impl: str = "auto"
    causal: bool = False
    lse: bool = False
    why_not: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention: what a kernel is given, and a mask that no interval holds."""

    q: Any
    k: Any
    v: Any
    case: Case
    mask: Mask | None
    how: How


@dataclasses.dataclass
class Choice:
    """Who computes it, and why those before did not."""

    name: str
    refused: dict[str, str]

    def __str__(self) -> str:
        refused = "".join(f"; not {name}: {why}" for name, why in self.refused.items())
        return self.name + refused


def forward(problem: Problem, platform: str | None, here: bool = True):
    """`(out, lse)` by the first who can, and the choice. None is any other platform.

    Not `here`, cuDNN is taken to be there, and nothing may be computed.
    """
    p = problem

    def run(name):
        if name in XLA:
            return XLA[name].forward(p.q, p.k, p.v, p.case, p.mask)
        if name == "cudnn":
            return cudnn.forward(p.q, p.k, p.v, p.case, p.how.causal, here)
        kernel = KERNELS[name]
        return kernel.forward(p.q, p.k, p.v, p.case, interpret=platform != kernel.home)

    return _first(problem, platform, run)


def backward(problem: Problem, out, lse, d_out, d_lse, platform: str | None, here=True):
    """`Gradients` by the first who can, and the choice; see `forward`."""
    p = problem

    def run(name):
        if name in XLA:
            return XLA[name].backward(p.q, p.k, p.v, p.case, out, lse, d_out, d_lse, p.mask)
        if name == "cudnn":
            return cudnn.backward(p.q, p.k, p.v, p.case, p.how.causal, d_out, here)
        kernel = KERNELS[name]
        given = (p.q, p.k, p.v, p.case, out, lse, d_out, d_lse)
        return kernel.backward(*given, interpret=platform != kernel.home)

    return _first(problem, platform, run)


def in_xla(problem: Problem, platform: str | None = None):
    """The XLA implementation for the size of the problem: `dense` or `chunked`."""
    return XLA[_xla(problem, platform)]


def _first(problem: Problem, platform: str | None, run: Callable):
    refused: dict[str, str] = {}
    for name, why_not in _candidates(problem, platform):
        try:
            if why_not:
                raise NotImplementedError(why_not)
            found = run(name)
        except NotImplementedError as error:
            if name == problem.how.impl:
                raise
            refused[name] = str(error)
            continue
        return found, Choice(name, refused)
    raise AssertionError("XLA can do every case")


def _candidates(problem: Problem, platform) -> Iterator[tuple[str, str | None]]:
    how = problem.how
    names = ORDER.get(platform, ()) if how.impl == "auto" else (how.impl,)
    for name in names:
        why_not = how.why_not
        if name == "cudnn" and platform != "cuda":
            why_not = why_not or "cuDNN runs on cuda alone"
        if name == "cudnn" and how.lse:
            why_not = why_not or "cuDNN gives no logsumexp in float32"
        yield name, why_not
    if how.impl == "auto":
        yield _xla(problem, platform), None


def _xla(problem: Problem, platform) -> str:
    limit = DENSE_LOGITS_ON_DEVICE if platform in ORDER else DENSE_LOGITS
    logits = problem.q.shape[1] * problem.k.shape[1]
    return "reference" if logits <= limit else "chunked"
