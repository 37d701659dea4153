"""Models of transformers that see images and videos as large as they are: Qwen-VL."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxformer.data.native import rows
from jaxformer.layers.block import Chain
from jaxformer.layers.native import CornerPosition, NativeEmbed
from jaxformer.models.deep import DeepEncoder
from jaxformer.models.native import NativeEncoder
from jaxformer.ops.activation import gelu, gelu_tanh
from jaxformer.ops.pack import resize
from jaxformer.ops.rotary_scaling import MRotary
from tests.parity.case import Case, edit, wrong
from tests.parity.language import blocks

IMAGE, VIDEO, PATCH = 17, 18, 2
# Pixels of what each row holds, with its tokens around them: wider than high and higher
# than wide; more than a window of 2 x 2 merged tokens both ways; a video of two patches.
IMAGES = (((), (12, 8)), ((4, 8), (8, 12)))
VIDEOS = ((None, None), (None, 4))  # how many frames.
ROWS = ((3, IMAGE, 2), (2, IMAGE, 1, VIDEO, 3))
TEXT = {
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SECTIONS = [1, 2, 3]
VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def law(sections, theta=50.0, **more):
    return {"rope_theta": theta, "rope_type": "default", "mrope_section": sections, **more}


def _build(kind, vision, text, **options):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION | vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **options,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _qwen2_vl():
    vision = {"embed_dim": 16, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2}
    return _build("Qwen2VL", vision, TEXT | {"rope_parameters": law(SECTIONS)})


def _qwen2_5_vl():
    vision = {
        "hidden_size": 16,
        "out_hidden_size": TEXT["hidden_size"],
        "intermediate_size": 20,
        "window_size": 8,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    text = TEXT | {"rope_parameters": law(SECTIONS), "rms_norm_eps": 1e-5}
    return _build("Qwen2_5_VL", vision, text, tie_word_embeddings=True)


def _qwen3_vl():
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": TEXT["hidden_size"],
        "intermediate_size": 20,
        "num_position_embeddings": 9,
        "deepstack_visual_indexes": [0, 1],
    }
    text = TEXT | {"head_dim": 14, "num_hidden_layers": 3}
    text["rope_parameters"] = law([3, 2, 2])
    return _build("Qwen3VL", vision, text)


def tokens_of(draw, grids):
    """Rows of text, with a token for each merged token of what the grids say."""
    made = []
    for row, found in zip(ROWS, grids, strict=True):
        seen = iter([g for g in found if g.any()])
        text = []
        for part in row:
            if part in (IMAGE, VIDEO):
                text += [part] * int(next(seen).prod() // 4)
            else:
                text += draw.integers(3, IMAGE, part).tolist()
        made.append(text)
    longest = max(map(len, made))
    made = [[*text, *draw.integers(3, IMAGE, longest - len(text))] for text in made]
    return np.array(made, "int32")


def inputs(draw):
    """A row with an image, and a row with an image and a video; patches of the first padded."""
    samples = []
    for shapes, frames in zip(IMAGES, VIDEOS, strict=True):
        samples.append([])
        for shape, count in zip(shapes, frames, strict=True):
            if shape:
                lead = () if count is None else (count,)
                samples[-1].append(draw.normal(size=(*lead, *shape, 3)))
    made = rows(samples, patch=PATCH, length=64, count=2)
    made["patches"] = made["patches"].astype("float32")
    return {"tokens": tokens_of(draw, made["grids"]), **made}


def theirs(module, inputs, seconds=None):
    import torch

    tokens, grids = inputs["tokens"].long(), inputs["grids"].long()
    flat, kinds = {IMAGE: [], VIDEO: []}, {IMAGE: [], VIDEO: []}
    for row in range(len(tokens)):
        start, order = 0, [part for part in ROWS[row] if part in flat]
        for part, grid in zip(order, grids[row], strict=False):
            stop = start + int(grid.prod())
            own = inputs["patches"][row, start:stop]
            own = own.reshape(len(own), 2, PATCH, PATCH, 3).permute(0, 4, 1, 2, 3)
            flat[part].append(own.flatten(1))
            kinds[part].append(grid)
            start = stop
    more = {} if seconds is None else {"second_per_grid_ts": torch.tensor(seconds)}
    module.model.rope_deltas = None
    found = module(
        tokens,
        pixel_values=torch.cat(flat[IMAGE]),
        image_grid_thw=torch.stack(kinds[IMAGE]),
        pixel_values_videos=torch.cat(flat[VIDEO]),
        video_grid_thw=torch.stack(kinds[VIDEO]),
        mm_token_type_ids=(tokens == IMAGE).int() + 2 * (tokens == VIDEO).int(),
        use_cache=False,
        **more,
    )
    return {"logits": found.logits}


def _theirs_paced(module, inputs):
    return theirs(module, inputs, [1.5])


def _paced(draw):
    found = inputs(draw)
    seconds = np.where(found["grids"][..., 0] > 1, 1.5, 0.0)
    return found | {"seconds": seconds.astype("float32")}


def ours(model, variables, inputs):
    more = {name: inputs[name] for name in ("seconds",) if name in inputs}
    args = (inputs[name] for name in ("tokens", "patches", "grids"))
    return {"logits": model.apply(variables, *args, **more)}


def in_text(change):
    """A mutation of the text's scores."""

    def mutate(model, inputs):
        path = "attention.scores.rotary"

        def block(old):
            return edit(old, path, change(old.attention.scores.rotary))

        language, _ = blocks(block)(model.language, inputs)
        return edit(model, "language", language), inputs

    return mutate


def in_images(change):
    """A mutation of the encoder's blocks."""

    def mutate(model, inputs):
        vision, _ = blocks(change)(model.vision, inputs)
        return edit(model, "vision", vision), inputs

    return mutate


class _RowByRow(NativeEncoder):
    """Merges patches that do not lie in a square, but beside each other."""

    def encode(self, patches, grids, *, train=False):
        x = super().encode(patches, grids, train=train)
        B, T, D = x.shape
        return x.reshape(B, T // 8, 2, 2, 2, D).swapaxes(2, 3).reshape(B, T, D)


class _InWindows(NativeEncoder):
    """Leaves merged tokens in the order of windows."""

    def _back(self, x, pool):
        return x


class _Transposed(NativeEmbed):
    """Takes rows for columns."""

    def __call__(self, patches, grids, *, train=False):
        return super().__call__(patches, grids[..., jnp.array([0, 2, 1])], train=train)


def encoder(kind):
    def mutate(model, inputs):
        return edit(model, "vision", kind(model.vision.embed, model.vision.stack)), inputs

    return mutate


def _embed(kind):
    def mutate(model, inputs):
        old = model.vision.embed
        fields = {f.name: getattr(old, f.name) for f in dataclasses.fields(old)}
        for name in ("parent", "name"):
            del fields[name]
        return edit(model, "vision.embed", kind(**fields)), inputs

    return mutate


def _merger(change):
    def mutate(model, inputs):
        norm, fold, project = model.connector.parts
        return edit(model, "connector", Chain(change(norm, fold, project))), inputs

    return mutate


def _two_frames(draw):
    """The video as two, with text between its frames, as Qwen3-VL lays it."""
    found = inputs(draw)
    grid = found["grids"][1, 1].copy()
    grid[0] = 1
    grids = np.zeros((2, 3, 3), np.int32)
    grids[:, :2] = found["grids"]
    grids[1, 1:] = grid
    tokens = found["tokens"]
    video = np.flatnonzero(tokens[1] == VIDEO)
    middle = video[len(video) // 2]
    row = np.insert(tokens[1], middle, 5)
    tokens = np.stack([np.append(tokens[0], 6), row]).astype("int32")
    return {"tokens": tokens, "patches": found["patches"], "grids": grids}


def _theirs_two_frames(module, inputs):
    """Their grids are of whole videos."""
    grids = inputs["grids"][:, :2].clone()
    grids[1, 1, 0] = 2
    return theirs(module, inputs | {"grids": grids})


class _Late(DeepEncoder):
    """Reads one layer later."""

    def encode(self, patches, grids, *, train=False):
        last, _, second = super().encode(patches, grids, train=train)
        return last, second, second


class _Half(CornerPosition):
    """Aligns no corners."""

    @nn.compact
    def __call__(self, at):
        rows, columns = self.shape
        zeros = nn.initializers.zeros
        table = self.param("embedding", zeros, (rows * columns, self.width))
        return resize(table.reshape(rows, columns, -1), at)


def _half(model, inputs):
    position = model.vision.embed.position
    return edit(model, "vision.embed.position", _Half(position.width, position.shape)), inputs


def _late(model, inputs):
    vision = model.vision
    return edit(model, "vision", _Late(vision.embed, vision.stack, vision.taps)), inputs


def _shallow(model, inputs):
    language, _ = blocks(lambda b: edit(b, "index", None))(model.language, inputs)
    return edit(model, "language", language), inputs


FACTS = {
    "other sections": in_text(lambda r: MRotary(r.theta, r.scaling, (2, 2, 2))),
    "interleaved": in_text(lambda r: MRotary(r.theta, r.scaling, r.sections, interleaved=True)),
    "theta": in_text(lambda r: MRotary(1e4, r.scaling, r.sections)),
    "merged beside each other": encoder(_RowByRow),
    "rows for columns": _embed(_Transposed),
    "theta of images": wrong("vision.embed.theta", 1e2),
    "the merger's gelu by tanh": _merger(
        lambda norm, fold, project: (norm, fold, edit(project, "activation", gelu_tanh))
    ),
}

CASES = (
    Case(
        "qwen2_vl",
        _qwen2_vl,
        inputs,
        theirs,
        ours,
        FACTS
        | {
            "exact gelu in images": in_images(lambda b: edit(b, "mlp.activation", gelu)),
            "epsilon of images": in_images(lambda b: edit(b, "epsilon", 1e-2)),
        },
        slow=True,
    ),
    Case(
        "qwen2_5_vl",
        _qwen2_5_vl,
        _paced,
        _theirs_paced,
        ours,
        FACTS
        | {
            "windows stay": encoder(_InWindows),
            "a wider window": wrong("vision.embed.window", 3),
            "a narrower window": wrong("vision.embed.window", 1),
            "all layers see all": in_images(lambda b: edit(b, "local", False)),
            "all layers see windows": in_images(lambda b: edit(b, "local", True)),
            "gelu in images": in_images(lambda b: edit(b, "mlp.activation", gelu)),
            "frames are one place apart": wrong("rate", None),
        },
    ),
    Case(
        "qwen3_vl",
        _qwen3_vl,
        _two_frames,
        _theirs_two_frames,
        ours,
        {
            "other sections": in_text(lambda r: edit(r, "sections", (5, 1, 1))),
            "in chunks": in_text(lambda r: edit(r, "interleaved", False)),
            "a layer later": _late,
            "nothing is added": _shallow,
            "positions without corners": _half,
            "exact gelu in images": in_images(lambda b: edit(b, "mlp.activation", gelu)),
        },
        slow=True,
    ),
)
