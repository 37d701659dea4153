"""ViTs as big_vision saves them: one `.npz`, of layers one by one or scanned as ours are.

Read are those of big_vision, of its `img` tower in a SigLIP, and of the code before it
(google-research/vision_transformer), with or without the state of an optimizer. Nothing is
unpickled. Source of the layout: `big_vision/models/vit.py`.
"""

import math
import pathlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxformer.convert import engine
from jaxformer.convert.engine import Entry, Family
from jaxformer.convert.files import Stored
from jaxformer.errors import InputError
from jaxformer.layers.embed import GridPosition
from jaxformer.layers.pool import AttentionPool
from jaxformer.models.vit import Encoder, ViT
from jaxformer.ops.activation import gelu_tanh
from jaxformer.sharding import FSDP_TENSOR, Rules

_ATTENTION = "MultiHeadDotProductAttention_"
# Names of older code, and what they became.
_OLDER = (
    (r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding"),
    (r"(/encoderblock_\d+/)LayerNorm_2/", r"\1LayerNorm_1/"),
    (r"(/encoderblock_\d+/)MlpBlock_3/", r"\1MlpBlock_0/"),
    (rf"(/encoderblock_\d+/){_ATTENTION}1/", rf"\g<1>{_ATTENTION}0/"),
    (rf"^(?=(probe$|MlpBlock_0/|{_ATTENTION}0/|LayerNorm_0/))", "MAPHead_0/"),
)


def load_npz(
    path: str | pathlib.Path,
    model: ViT | Encoder | None = None,
    *,
    tower: str = "",
    mesh: Mesh | None = None,
    rules: Rules = FSDP_TENSOR,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> tuple[nn.Module, Any]:
    """The model and the parameters of a checkpoint of big_vision.

    Args:
      path: the file.
      model: what it is of. If not given it is told from the tensors, with positions of a
        square grid; all but "map", "tok" and "cls" is taken for average pooling.
      tower: the part of a larger model, such as "img".
      mesh: where the parameters lie; the first device if not given.
      rules: which logical axis lies on which axis of the mesh.
      dtype: what a model that is told from the tensors computes in.
      param_dtype: what the parameters are kept in.

    Raises:
      InputError: a file that is damaged or holds objects; tensors that are missing, unknown,
        or of another shape, all in one error; a model that cannot be told.
    """
    path = pathlib.Path(path)
    stored = _open(path)
    for lead in ("params/", "opt/target/"):  # Beside the state of an optimizer.
        if any(name.startswith(lead) for name in stored):
            stored = _below(stored, lead)
            break
    stored = _below(stored, f"{tower}/") if tower else stored
    if "embedding/kernel" not in stored:
        raise InputError(
            f"{path}: holds no ViT{f' at {tower!r}' if tower else ''}: embedding/kernel is "
            "missing; name another tower"
        )
    scanned = any(name.startswith("Transformer/encoderblock/") for name in stored)
    patch = stored["embedding/kernel"].shape
    if len(patch) != 4:
        raise InputError(f"{path}: embedding/kernel has shape {patch}, not [p, p, C, D]")
    family = _family(patch[2], scanned)
    tensors = {family.canonical(name): tensor for name, tensor in stored.items()}
    if model is None:
        try:
            model = _told(tensors, scanned, dtype)
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"{path}: its tensors do not tell the model ({error}); give one"
            ) from error
    params = engine.read(
        family,
        _parts(model),
        tensors,
        mesh=mesh,
        rules=rules,
        dtype=param_dtype,
        where=str(path),
    )
    return model, params


def save_npz(
    path: str | pathlib.Path, model: ViT | Encoder, params: Any, *, scanned: bool = False
) -> None:
    """Writes parameters as big_vision reads them, all under `params/`.

    Args:
      path: the file.
      model: whose blocks and poolings big_vision has, such as `load_npz` gave.
      params: its parameters.
      scanned: layers in one tensor, as with big_vision's `scan=True`.

    Raises:
      InputError: parameters that are not the model's.
      ValueError: the model has parameters for which big_vision has no name.
    """
    flat = engine.flat(nn.unbox(params))
    patch = _parts(model).embed.patch
    kernel = flat.get("embed/patch/kernel", np.zeros((patch**2, 1)))
    family = _family(kernel.shape[0] // patch**2, scanned)
    found = engine.tensors_of(family, _parts(model), params)
    tensors: dict[str, Any] = {f"params/{name}": tensor for name, tensor in found}
    with pathlib.Path(path).open("wb") as file:
        np.savez(file, **tensors)


def _parts(model: ViT | Encoder) -> Any:
    return model.parts() if isinstance(model, ViT) else model


def _told(tensors: Mapping[str, Any], scanned: bool, dtype: DTypeLike) -> ViT:
    """The model that tensors are of; KeyError or ValueError where it cannot be told."""
    block = "Transformer/encoderblock" if scanned else "Transformer/encoderblock_0"
    *_, D, N, _ = tensors[f"{block}/{_ATTENTION}0/query/kernel"].shape
    F = tensors[f"{block}/MlpBlock_0/Dense_0/kernel"].shape[-1]
    numbers = {re.match(r"Transformer/encoderblock_(\d+)/", name) for name in tensors}
    depth = len({found[1] for found in numbers if found is not None})
    if scanned:
        depth = tensors[f"{block}/LayerNorm_0/scale"].shape[0]
    patch = tensors["embedding/kernel"].shape[0]
    pool, size, positions = "gap", None, "sincos"
    if "MAPHead_0/probe" in tensors:
        pool = "map"
    elif "cls" in tensors:
        pool = "tok"
    if "pos_embedding" in tensors:
        count, positions = tensors["pos_embedding"].shape[1], "learned"
        if pool == "tok" and math.isqrt(count) ** 2 == count - 1:
            pool, count = "cls", count - 1
        side = math.isqrt(count)
        if side**2 != count:
            raise ValueError(f"{count} positions are no square grid")
        size = (side * patch, side * patch)
    width = "pre_logits/bias"
    return ViT(
        D,
        depth,
        F,
        N,
        patch,
        tensors["head/bias"].shape[0] if "head/bias" in tensors else 0,
        size=size,
        positions=positions,
        pool=pool,
        activation=gelu_tanh,
        rep_size=tensors[width].shape[0] if width in tensors else 0,
        dtype=dtype,
    )


def _entries(scanned: bool, model: Encoder) -> list[Entry]:
    embed = model.embed
    patch = {"p": embed.patch, "q": embed.patch}
    found = [
        Entry("embed/patch/kernel", "embedding/kernel", "p q C D -> (p q C) D", patch),
        Entry("embed/patch/bias", "embedding/bias", "D -> D"),
        *_norm("norm", "Transformer/encoder_norm"),
    ]
    theirs, layers = ("encoderblock", "L ") if scanned else ("encoderblock_{}", "")
    theirs = f"Transformer/{theirs}"
    found += _norm("stack/block/attention_norm", f"{theirs}/LayerNorm_0", layers)
    found += _norm("stack/block/mlp_norm", f"{theirs}/LayerNorm_1", layers)
    found += _branches("stack/block", theirs, layers)
    if isinstance(embed.position, GridPosition):
        found.append(Entry("embed/position/embedding", "pos_embedding", "() T D -> T D"))
    if embed.prefix:
        found.append(Entry("embed/cls/embedding", "cls", "() () D -> D", at=0))
    if isinstance(model.pool, AttentionPool):
        found.append(Entry("pool/probe/embedding", "MAPHead_0/probe", "() T D -> T D"))
        found += _norm("pool/norm", "MAPHead_0/LayerNorm_0")
        found += _branches("pool", "MAPHead_0")
    if model.neck is not None:
        found += _alike("neck/linear", "pre_logits", "D P", "P")
    if model.num_classes:
        found += _alike("head", "head", "D V", "V")
    return found


def _alike(ours: str, theirs: str, kernel: str, bias: str, layers: str = "") -> list[Entry]:
    """Kernel and bias, which lie in theirs as in ours."""
    pairs = {"kernel": layers + kernel, "bias": layers + bias}
    return [Entry(f"{ours}/{n}", f"{theirs}/{n}", f"{x} -> {x}") for n, x in pairs.items()]


def _norm(ours: str, theirs: str, layers: str = "") -> list[Entry]:
    layout = f"{layers}D -> {layers}D"
    return [Entry(f"{ours}/{n}", f"{theirs}/{n}", layout) for n in ("scale", "bias")]


def _branches(ours: str, theirs: str, layers: str = "") -> list[Entry]:
    """Attention and MLP, of a block or of the pooling."""
    attention = f"{theirs}/{_ATTENTION}0"
    found = []
    for name in ("query", "key", "value"):
        path = f"{ours}/attention/{name}"
        found += _alike(path, f"{attention}/{name}", "D N H", "N H", layers)
    found += _alike(f"{ours}/attention/out", f"{attention}/out", "N H D", "D", layers)
    found += _alike(f"{ours}/mlp/up", f"{theirs}/MlpBlock_0/Dense_0", "D F", "F", layers)
    found += _alike(f"{ours}/mlp/down", f"{theirs}/MlpBlock_0/Dense_1", "F D", "D", layers)
    return found


def _family(channels: int, scanned: bool) -> Family:
    def inputs(model: Encoder) -> list[jax.ShapeDtypeStruct]:
        embed = model.embed
        y, x = getattr(embed.position, "shape", (1, 1)) or (0, 0)
        if not y:
            raise InputError(
                "the model's learned positions are of no size; give it one, (rows, columns)"
            )
        shape = (1, y * embed.patch, x * embed.patch, channels)
        return [jax.ShapeDtypeStruct(shape, jnp.float32)]

    def none(*_) -> Any:
        raise NotImplementedError("big_vision has no config; its model is given")

    return Family(
        name="big_vision",
        model=none,
        config=none,
        entries=lambda model: _entries(scanned, model),
        inputs=inputs,
        rename=_OLDER,
    )


@dataclass(frozen=True)
class _Whole(Stored):
    """A tensor that can only be read as a whole: compressed, or in Fortran's order."""

    name: str

    def read(self, rows: slice | None = None) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive, archive.open(self.name) as file:
            found = np.lib.format.read_array(file, allow_pickle=False).view(self.dtype)
        return found if rows is None else found[rows]


def _open(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of an `.npz`, by name; none is read yet."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError(f"{name} is in it twice")
                found[name] = _member(path, archive, info, raw)
    except (
        OSError,
        ValueError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"{path}: is no whole .npz of arrays ({str(error).strip()}); fetch it again"
        ) from error
    return found


def _member(path, archive, info: zipfile.ZipInfo, raw) -> Stored:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"{info.filename} is in version {version} of npy")
        shape, fortran, dtype = read(file)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects, which are refused")
    if header + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} is not as long as it says")
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
    if fortran or info.compress_type != zipfile.ZIP_STORED:
        return _Whole(path, shape, dtype, 0, info.filename)
    # Where it lies in the file: behind the member's own header, whose length it tells.
    raw.seek(info.header_offset + 26)
    names, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
    return Stored(path, shape, dtype, info.header_offset + 30 + names + extra + header)


def _below(tensors: Mapping[str, Any], lead: str) -> dict[str, Any]:
    return {n.removeprefix(lead): x for n, x in tensors.items() if n.startswith(lead)}
