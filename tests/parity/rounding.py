"""What another processor's rounding does to an original: its answers, rounded at random.

Processors differ in the last digit of exponentials and in the order of sums, and a case
whose answers hang on those would pass on one machine and fail on the next.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDED = {
    *("mm", "addmm", "bmm", "baddbmm", "linear", "convolution"),
    *("exp", "exp2", "log", "sin", "cos", "tanh", "erf", "sigmoid", "silu", "gelu"),
    *("pow", "rsqrt", "reciprocal", "div", "mean", "var_mean", "_softmax"),
}


class Rounding(TorchDispatchMode):
    """Within it each float32 of an operation in `ROUNDED` moves by -1, 0 or 1 ulp."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, x):
        """x, each number or one of its neighbours."""
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        way = torch.randint(-1, 2, x.shape, generator=self.generator)
        above, below = (torch.nextafter(x, torch.full_like(x, e * torch.inf)) for e in (1, -1))
        return torch.where(way > 0, above, torch.where(way < 0, below, x))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.moved(out) if func.overloadpacket.__name__ in ROUNDED else out
