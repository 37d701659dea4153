"""Images as discrete tokens among those of text, for a decoder that reads and writes both.

An autoencoder's codes (`models.vae.VQAutoencoder`) get ids of their own behind those of the
text: early fusion. Sources: Chameleon, arXiv 2405.09818; Emu3, arXiv 2409.18869.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxformer.errors import InputError


@dataclass(frozen=True)
class Vocabulary:
    """The ids of `text`, then one each for an image's begin, line and end, then its `codes`.

    An image of codes `[y, x]` is its begin, the codes row by row, a line's end behind each
    row with `lines` (Emu3), and its end. `vocab` is that of the `models.decoder.Decoder`.

    Raises:
      InputError: fewer than one id of text or code.
    """

    text: int
    codes: int
    lines: bool = True

    def __post_init__(self):
        if min(self.text, self.codes) < 1:
            raise InputError(f"text={self.text} and codes={self.codes} must be 1 or more ids")

    @property
    def vocab(self) -> int:
        """How many ids there are."""
        return self.text + 3 + self.codes

    @property
    def begin(self) -> int:
        """What stands before an image; a line's end and the image's end come after it."""
        return self.text

    def encode(self, codes: Int[np.ndarray, "y x"]) -> Int[np.ndarray, " n"]:
        """The ids of an image.

        Example:
          >>> Vocabulary(text=10, codes=4).encode(np.array([[0, 1], [2, 3]])).tolist()
          [10, 13, 14, 11, 15, 16, 11, 12]

        Raises:
          InputError: a code that the codebook does not have.
        """
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codes:
            raise InputError(
                f"codes from {codes.min()} to {codes.max()} are not of the {self.codes} that "
                "the vocabulary has; name as many as the codebook"
            )
        rows = codes + self.text + 3
        if self.lines:
            rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=self.begin + 1)
        ends = [self.begin], rows.reshape(-1), [self.begin + 2]
        return np.concatenate(ends).astype(np.int32)

    def decode(
        self, ids: Int[np.ndarray, " n"], columns: int | None = None
    ) -> list[Int[np.ndarray, "y x"]]:
        """The codes of every image among ids, in order; text is passed over.

        Args:
          ids: of texts and images.
          columns: of an image without `lines`; a square where it is not given.

        Raises:
          InputError: an image that does not end, or is no grid of codes.
        """
        found, at = [], np.flatnonzero(ids == self.begin)
        for first in at:
            ends = np.flatnonzero(ids[first:] == self.begin + 2)
            inside = ids[first + 1 : first + ends[0]] if len(ends) else ids[:0]
            wide = columns or round(len(inside) ** 0.5)
            if self.lines:
                breaks = np.flatnonzero(inside == self.begin + 1)
                wide = int(breaks[0]) + 1 if len(breaks) else 0
            if not len(inside) or not wide or len(inside) % wide:
                raise InputError(
                    f"the image at id {first} has {len(inside)} ids, which are no rows of "
                    f"{wide} with an end; draw an image whole"
                )
            rows = inside.reshape(-1, wide)
            last = rows[:, -1] == self.begin + 1
            rows = rows[:, :-1] if self.lines else rows
            codes = rows - self.text - 3
            if (self.lines and not last.all()) or codes.min(initial=0) < 0:
                raise InputError(
                    f"the image at id {first} has text or a line's end among its codes; draw "
                    "its tokens from the codes alone"
                )
            found.append(codes.astype(np.int32))
        return found
