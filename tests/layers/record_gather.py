"""`python -m tests.layers.record_gather`: records Qwen-VL's connector, by torch's attention.

Needs the extra `parity`. transformers does not have it: it is written out here as the
`visual.py` of Qwen-VL has it, with the positions of MAE's `util/pos_embed.py`.
"""

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parent / "gather.npz"
SIDE, WIDTH, HEADS, CHANNELS = 3, 8, 2, 10


def positions() -> np.ndarray:
    """`[SIDE, SIDE, WIDTH]`: half of the columns, half of the rows; sines, then cosines."""
    omega = 1 / 10000 ** (np.arange(WIDTH // 4) / (WIDTH / 4))
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    halves = [np.einsum("yx,d->yxd", at, omega) for at in (columns, rows)]
    return np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], -1)


def main() -> None:
    """Records it."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    at = torch.tensor(positions(), dtype=torch.float32)
    parts = nn.ModuleDict(
        {
            "kv_proj": nn.Linear(CHANNELS, WIDTH, bias=False),
            "attn": nn.MultiheadAttention(WIDTH, HEADS),
            "ln_q": nn.LayerNorm(WIDTH, eps=1e-6),
            "ln_kv": nn.LayerNorm(WIDTH, eps=1e-6),
            "ln_post": nn.LayerNorm(WIDTH, eps=1e-6),
        }
    )
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    query, proj = torch.randn(SIDE**2, WIDTH), torch.randn(WIDTH, WIDTH)
    found = {name: x.numpy() for name, x in parts.state_dict().items()}
    found |= {"query": query.numpy(), "proj": proj.numpy()}
    for rows in (4, 3):
        x = torch.randn(2, rows * rows, CHANNELS)
        grid = at.permute(2, 0, 1)[None]
        if rows != SIDE:
            grid = nn.functional.interpolate(
                grid, size=(rows, rows), mode="bicubic", align_corners=False
            )
        places = grid[0].permute(1, 2, 0).reshape(-1, WIDTH)
        with torch.no_grad():
            kv = parts["ln_kv"](parts["kv_proj"](x)).permute(1, 0, 2)
            q = (parts["ln_q"](query) + at.reshape(-1, WIDTH))[:, None].repeat(1, 2, 1)
            y = parts["attn"](q, kv + places[:, None], kv)[0].permute(1, 0, 2)
            y = parts["ln_post"](y) @ proj
        found |= {f"in:{rows}": x.numpy(), f"out:{rows}": y.numpy()}
    np.savez_compressed(PATH, **found)
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
