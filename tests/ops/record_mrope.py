"""Writes mrope.json: what transformers says of tokens among images and videos.

python -m tests.ops.record_mrope, where the extra `parity` is installed.
"""

import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("mrope.json")
TEXT, IMAGE, VIDEO = 0, 1, 2  # their mm_token_type_ids.
# Each row: lengths of text, or (kind, frames, rows, columns) in patches, of which 2 x 2 are
# one token; then padding. Grids are wider than high, higher than wide, and of frames.
ROWS = {
    "qwen2_vl": (
        [3, (IMAGE, 1, 4, 6), 2, (IMAGE, 1, 8, 2), 1],
        [(VIDEO, 5, 4, 2), 4, (IMAGE, 1, 2, 2), 3],
        [20],
    ),
    "qwen2_5_vl": (
        [2, (VIDEO, 3, 4, 6), 1, (VIDEO, 2, 2, 4), 1],
        [1, (IMAGE, 1, 6, 4), 1, (VIDEO, 2, 4, 4), 2],
    ),
    "qwen3_vl": (
        [1, (VIDEO, 1, 4, 6), 2, (VIDEO, 1, 4, 6), 1],  # One video of two frames.
        [3, (IMAGE, 1, 4, 4), 2],
    ),
}
SECONDS = (0.6, 1.5, 2.0)  # of a frame of each video of qwen2_5_vl; 2 tokens a second.
SECTIONS = {"qwen2_vl": (2, 3, 5), "qwen2_5_vl": (2, 3, 5), "qwen3_vl": (4, 3, 3)}
HEAD, THETA = 20, 1e2


def layout(rows):
    """Kinds of tokens `[B, T]`, -1 for padding, and the grids of each row."""
    kinds, grids = [], []
    for row in rows:
        kinds.append([])
        grids.append([])
        for part in row:
            if isinstance(part, int):
                kinds[-1] += [TEXT] * part
                continue
            kind, frames, y, x = part
            kinds[-1] += [kind] * (frames * y * x // 4)
            grids[-1].append((kind, frames, y, x))
    longest = max(map(len, kinds))
    return np.array([k + [-1] * (longest - len(k)) for k in kinds]), grids


def model(name: str):
    import transformers

    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    text = {
        "hidden_size": 2 * HEAD,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "head_dim": HEAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_theta": THETA,
            "rope_type": "default",
            "mrope_section": list(SECTIONS[name]),
        },
    }
    if name != "qwen3_vl":
        del text["head_dim"]
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
    if name == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2}
    if name == "qwen2_5_vl":
        vision["tokens_per_second"] = 2
    if name == "qwen3_vl":
        vision |= {"num_position_embeddings": 4, "deepstack_visual_indexes": []}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
    return getattr(transformers, f"{kind}Model")(config)


def record() -> dict:
    import torch

    found = {}
    for name, rows in ROWS.items():
        kinds, grids = layout(rows)
        grids = [grid for row in grids for grid in row]
        images = [g[1:] for g in grids if g[0] == IMAGE]
        videos = [g[1:] for g in grids if g[0] == VIDEO]
        if name == "qwen3_vl":  # Their grids are of whole videos.
            videos = [(2, *videos[0][1:])]
        more = {}
        if name == "qwen2_5_vl":
            more["second_per_grid_ts"] = torch.tensor(SECONDS)
        module = model(name)
        places, deltas = module.get_rope_index(
            input_ids=torch.zeros(kinds.shape, dtype=torch.long),
            mm_token_type_ids=torch.tensor(kinds.clip(0)),
            image_grid_thw=torch.tensor(images),
            video_grid_thw=torch.tensor(videos),
            attention_mask=torch.tensor(kinds >= 0).long(),
            **more,
        )
        cos, sin = module.language_model.rotary_emb(torch.zeros(1), places)
        angles = {"cos": cos, "sin": sin}
        found[name] = {
            "places": places.permute(1, 2, 0).tolist(),
            "deltas": deltas[:, 0].tolist(),
            **{
                k: np.round(v[0, :, : HEAD // 2].numpy(), 6).tolist() for k, v in angles.items()
            },
        }
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n")
