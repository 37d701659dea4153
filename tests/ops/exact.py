"""Attention in NumPy's float64, with its gradients written by hand: what all others equal."""

import dataclasses
from typing import Any

import numpy as np

EPSILON = 1e-6


@dataclasses.dataclass
class Exact:
    """One problem; `x` holds q, k, v and what else is learned, by the names of `Gradients`."""

    x: dict[str, np.ndarray]
    seen: np.ndarray
    scale: float
    softcap: float | None = None
    slopes: Any = None
    offset: int = 0
    centered: bool = False
    angles: Any = None

    def side(self, name):
        """Queries or keys, normalised and rotated, and what the way back needs."""
        x, kept = self.x[name], {}
        if f"{name}_scale" in self.x:
            x = x - x.mean(-1, keepdims=True) if self.centered else x
            kept["r"] = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
            kept["unit"] = x * kept["r"]
            x = kept["unit"] * self.x[f"{name}_scale"] + self.x.get(f"{name}_shift", 0)
        return (x if self.angles is None else turn(x, self.angles)), kept

    def side_back(self, name, d, kept, grads):
        d = d if self.angles is None else turn(d, -self.angles)
        if kept:
            axes = (0, 1, 2)
            grads[f"{name}_scale"] = (d * kept["unit"]).sum(axes)
            if f"{name}_shift" in self.x:
                grads[f"{name}_shift"] = d.sum(axes)
            d = d * self.x[f"{name}_scale"]
            d = kept["r"] * (d - kept["unit"] * (d * kept["unit"]).mean(-1, keepdims=True))
            d = d - d.mean(-1, keepdims=True) if self.centered else d
        grads[name] = d

    def forward(self):
        (q, q_kept), (k, k_kept) = self.side("q"), self.side("k")
        G = q.shape[2] // k.shape[2]
        k, v = (np.repeat(y, G, axis=2) for y in (k, self.x["v"]))
        logits = np.einsum("btnh,bsnh->bnts", q, k, optimize=True) * self.scale
        slope = 1.0
        if self.softcap is not None:
            capped = np.tanh(logits / self.softcap)
            logits, slope = self.softcap * capped, 1 - capped**2
        logits = logits + self.x.get("bias", 0)
        T, S = logits.shape[2:]
        if self.slopes is not None:
            far = np.abs(np.arange(T)[:, None] + self.offset - np.arange(S))
            logits = logits - np.asarray(self.slopes, float)[:, None, None] * far
        logits = np.where(self.seen[:, None], logits, -np.inf)
        highest = logits.max(-1, keepdims=True)
        weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0))
        total = weights.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = (np.log(total) + highest)[..., 0]
        weights = weights / np.where(total > 0, total, 1)
        out = np.einsum("bnts,bsnh->btnh", weights, v, optimize=True)
        self.kept = q, k, v, weights, slope, q_kept, k_kept, G
        return out, lse

    def backward(self, d_out, d_lse):
        """Gradients by name; `forward` was called before."""
        q, k, v, weights, slope, q_kept, k_kept, G = self.kept
        (B, S, N, H), grads = k.shape, {}
        d = np.einsum("btnh,bsnh->bnts", d_out, v, optimize=True)
        d = weights * (d - (d * weights).sum(-1, keepdims=True) + d_lse[..., None])
        if "bias" in self.x:
            shape = self.x["bias"].shape
            grads["bias"] = d.sum(tuple(i for i in (0, 1) if shape[i] == 1), keepdims=True)
        d = d * slope * self.scale
        grads["v"] = np.einsum("bnts,btnh->bsnh", weights, d_out, optimize=True)
        grads["v"] = grads["v"].reshape(B, S, N // G, G, H).sum(3)
        self.side_back("q", np.einsum("bnts,bsnh->btnh", d, k, optimize=True), q_kept, grads)
        d_k = np.einsum("bnts,btnh->bsnh", d, q, optimize=True)
        self.side_back("k", d_k.reshape(B, S, N // G, G, H).sum(3), k_kept, grads)
        return grads

    def tangent(self, moves, step=1e-5):
        """The derivative of `out` along `moves`, by a central difference."""
        ends = []
        for sign in (1, -1):
            x = {n: a + sign * step * moves[n] for n, a in self.x.items()}
            ends.append(dataclasses.replace(self, x=x).forward()[0])
        return (ends[0] - ends[1]) / (2 * step)


def turn(x, angles):
    """Rotates the pairs of halves by `angles` `[#B, T, H / 2]`."""
    z = (x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]) * np.exp(
        1j * angles[:, :, None]
    )
    return np.concatenate([z.real, z.imag], -1)
