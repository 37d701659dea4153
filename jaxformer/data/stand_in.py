"""What a batch looks like where the data is not on this machine: shapes, no values."""

import functools
import io
from typing import Any

import jax
import numpy as np

from jaxformer.data import coco
from jaxformer.data.latents import Draw, Mean
from jaxformer.data.loader import Pipeline, train_batches
from jaxformer.data.mixture import Mixture
from jaxformer.data.rows import Rows, Windows
from jaxformer.data.shards import ArrayRecord, Captions, Parquet
from jaxformer.data.sources import ImageFolder, Record
from jaxformer.data.text import Tokenize
from jaxformer.data.vqa import Dialogues, PackedDialogues
from jaxformer.errors import InputError

_SIDE = 256  # of the picture that stands in for a file's.
_EIGHTH, _CHANNELS = 8, 4  # Latents of such a picture by Stable Diffusion's autoencoder.
_FEW = 2  # records tell the shapes of any number.


@functools.singledispatch
def record(source: Any) -> Record:
    """A made-up record in the place of a source's own; register what a new source has."""
    raise InputError(
        f"{type(source).__name__}: its data is not on this machine, and nothing says what its "
        "records look like; put the data there, or register the source with "
        "jaxformer.data.stand_in.record"
    )


@record.register(ArrayRecord)
@record.register(Parquet)
@record.register(ImageFolder)
def _(source) -> Record:
    return {"image": _picture(), "label": 0, "source": "a stand-in"}


@record.register
def _(source: Captions) -> Record:
    return {"image": _picture(), "text": "a stand-in", "source": "a stand-in"}


@record.register
def _(source: coco.Captions) -> Record:
    text = {"text": "a stand-in"} if source.pairs else {"captions": ["a stand-in"]}
    return {"image": _picture(), "source": "a stand-in"} | text


@record.register(Rows)
@record.register(Windows)
def _(source) -> Record:
    zeros = np.zeros(source.length, np.int32)
    answer = {"answer": zeros} if isinstance(source, Windows) else {}
    return {"tokens": zeros, "segments": zeros + 1, "source": "a stand-in"} | answer


@record.register
def _(source: Dialogues) -> Record:
    row = np.zeros(source.length, np.int32)
    images = np.zeros((source.most, *source.size), np.float32)
    told = {"tokens": row, "segments": row + 1, "answer": row, "images": images}
    return told | {"source": "a stand-in"}


@record.register
def _(source: PackedDialogues) -> Record:
    return record(source.dialogues)


@record.register
def _(source: Mixture) -> Record:
    return record(source.parts[0])


@functools.singledispatch
def transform(transform: Any) -> Any:
    """What stands in for a transform that reads a file; others do as they are."""
    return transform


@transform.register
def _(transform: Tokenize):
    def spell(record: Record) -> Record:
        rest = {name: value for name, value in record.items() if name != "text"}
        return rest | {"tokens": np.full(transform.length, transform.pad, np.int32)}

    return spell


@transform.register(Draw)
@transform.register(Mean)
def _(transform):
    channels = len(transform.scale) if isinstance(transform.scale, tuple) else _CHANNELS
    latents = np.zeros((_SIDE // _EIGHTH, _SIDE // _EIGHTH, channels), np.float32)
    return lambda record: record | {"image": latents}


def shapes(pipeline: Pipeline, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The entries of a batch by shape and dtype: by the data if it is there, or without.

    Raises:
      InputError: the data is not there, and nothing stands in for its source; or a
        transform that does not fit.
    """
    try:
        batch = _first(pipeline.source, pipeline.transforms, pipeline)
    except (InputError, OSError) as missing:
        try:
            alone = record(pipeline.source)
        except InputError:
            raise missing from None
        transforms = tuple(transform(t) for t in pipeline.transforms)
        batch = _first([alone] * _FEW, transforms, pipeline)
    return {
        name: jax.ShapeDtypeStruct((batch_size * len(x) // _FEW, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }


def _first(source, transforms, pipeline: Pipeline) -> dict[str, np.ndarray]:
    alone = Pipeline(source, transforms, pipeline.batch_transforms)
    data = train_batches(alone, batch_size=_FEW, seed=0)
    try:
        return next(data)
    finally:
        data.close()


@functools.cache
def _picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((_SIDE, _SIDE, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()
