"""Images with captions in COCO's layout: one JSON file, and a folder of images.

Source: Chen et al. 2015, arXiv 1504.00325, and its files `captions_train2017.json` and so on.
"""

import functools
import json
import pathlib
from dataclasses import dataclass
from typing import Any

from jaxformer.data.shards import Reopened
from jaxformer.data.sources import Record
from jaxformer.errors import InputError

_LAYOUT = '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'


@dataclass(frozen=True)
class Captions(Reopened):
    """Each image with its `captions`; with `pairs` each caption, as `text`, with its image.

    `source[i]` is `{"image": bytes, "captions": [...], "source"}` or `{"image": bytes, "text":
    "...", "source"}`, images by their numbers; `image` is still encoded, see `images.Decode`.
    Images without a caption are left out.

    Raises:
      InputError: no such file, it is not in this layout, or an image that cannot be read.
    """

    path: str
    root: str  # the folder in which images lie.
    pairs: bool = False

    @functools.cached_property
    def _rows(self) -> list[tuple[int, str, list[str]]]:
        """(number of the image, name of its file, captions)."""
        names: dict[Any, str] = {}
        said: dict[Any, list[str]] = {}
        try:
            found = json.loads(pathlib.Path(self.path).read_text(encoding="utf-8"))
            for image in found["images"]:
                names[image["id"]] = image["file_name"]
            for note in found["annotations"]:
                said.setdefault(note["image_id"], []).append(note["caption"])
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: is no file of COCO's captions ({type(error).__name__}: {error}"
                f"); it is {_LAYOUT}"
            ) from error
        strange = [key for key in said if key not in names]
        if strange:
            raise InputError(
                f"{self.path}: has a caption of image {strange[0]}, which is not among its "
                "images; leave it out"
            )
        rows = [(key, names[key], said[key]) for key in sorted(said)]
        if self.pairs:
            rows = [(key, name, [text]) for key, name, texts in rows for text in texts]
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        number, name, texts = self._rows[index]
        root = pathlib.Path(self.root).resolve()
        path = (root / name).resolve()
        where = f"{self.path}: image {number}"
        if not path.is_relative_to(root):
            raise InputError(f"{where}: {name!r} lies outside of the folder of images")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{where}: {name} cannot be read ({error.strerror})") from error
        what: Record = {"text": texts[0]} if self.pairs else {"captions": texts}
        return {"image": data, "source": where} | what
