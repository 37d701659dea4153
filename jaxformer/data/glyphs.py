"""Drawn Unicode characters: the fonts that matplotlib ships, as labelled images.

Sixteen text fonts in four families are drawn: DejaVu Sans, Mono and Serif (alike in
design) and STIX General (another one, after Times), each in four styles. They hold 7,399
characters with a Unicode name. A character is left out where a font draws it with the
very outline of an earlier one (the Cyrillic A where there is the Latin one), or draws
nothing, because no picture could tell its name: 6,181 are left.

The other fonts that come along are left out: the six of Computer Modern order their
characters by TeX's encodings and not Unicode's, `STIXSiz*` holds the same brackets in
larger sizes, `STIXNonUni*` private characters, and `LastResort` a placeholder a block.
"""

import functools
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxformer.data.sources import Record
from jaxformer.errors import InputError

FAMILIES = {
    "Sans": tuple(f"DejaVuSans{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    "Mono": tuple(f"DejaVuSansMono{s}" for s in ("", "-Bold", "-Oblique", "-BoldOblique")),
    "Serif": tuple(f"DejaVuSerif{s}" for s in ("", "-Bold", "-Italic", "-BoldItalic")),
    "STIX": tuple(f"STIXGeneral{s}" for s in ("", "Bol", "Italic", "BolIta")),
}

_EM, _BASELINE = 0.75, 0.75  # of the image's height: room for accents and descenders.


@dataclass(frozen=True)
class Glyphs:
    """Characters to classify, `[size, size, 1]` uint8, white on black; fonts are held out.

    The classes are the 650 characters that all sixteen fonts have, in order of their code
    points (Latin, Greek and Cyrillic letters, signs, lines of boxes). "test" is the family
    `held`, "train" the other twelve fonts. DejaVu's three families share a designer, so
    that STIX is the hard one to hold out, and the honest one.

    >>> len(Glyphs("train")), len(Glyphs("test")), Glyphs().num_classes
    (7800, 2600, 650)

    Raises:
      InputError: another split or family, or matplotlib or Pillow is not installed.
    """

    split: str = "train"
    size: int = 24
    held: str = "STIX"

    def __post_init__(self):
        _check(self, ("train", "test"))

    @property
    def classes(self) -> tuple[str, ...]:
        """The characters' Unicode names; a label is a place in here."""
        return tuple(unicodedata.name(c) for c in _shared())

    @property
    def num_classes(self) -> int:
        return len(_shared())

    @property
    def _fonts(self) -> tuple[str, ...]:
        return FAMILIES[self.held] if self.split == "test" else _other_fonts(self.held)

    def __len__(self) -> int:
        return len(self._fonts) * len(_shared())

    def __getitem__(self, index: int) -> Record:
        font, label = divmod(range(len(self))[index], len(_shared()))
        return _record(self._fonts[font], _shared()[label], self.size) | {"label": label}


@dataclass(frozen=True)
class NamedGlyphs:
    """Characters with their Unicode names as `text`, to match pictures with words.

    A tenth of the 6,181 characters is held out by a hash of the code point, and the family
    `held` besides. The splits, counted for STIX, are what a model is asked for:

    - "train": 38,362 drawings, of the other characters in the other fonts;
    - "fonts": 1,587 characters whose names were seen, in a font that was not;
    - "characters": 548 whose names and shapes were not seen, in fonts that were;
    - "both": 250 unseen ones in an unseen font.

    The last three draw a character once, in the first font of theirs that has it, so that
    retrieval has one right answer. `label` is the character's place among all 6,181. Names
    have up to 73 letters: `text.Spell(74)` makes tokens of them.

    >>> [len(NamedGlyphs(s)) for s in ("train", "fonts", "characters", "both")]
    [38362, 1587, 548, 250]

    Raises:
      InputError: another split or family, or matplotlib or Pillow is not installed.
    """

    split: str = "train"
    size: int = 24
    held: str = "STIX"

    def __post_init__(self):
        _check(self, ("train", "fonts", "characters", "both"))

    @property
    def classes(self) -> tuple[str, ...]:
        """The characters' Unicode names; a label is a place in here."""
        return tuple(unicodedata.name(c) for c in _characters())

    @property
    def num_classes(self) -> int:
        return len(_characters())

    def __len__(self) -> int:
        return len(_named(self.split, self.held))

    def __getitem__(self, index: int) -> Record:
        font, label = _named(self.split, self.held)[index]
        character = _characters()[label]
        return _record(font, character, self.size) | {
            "label": label,
            "text": unicodedata.name(character),
        }


@dataclass(frozen=True)
class StyledGlyphs:
    """Characters to draw in a font that is asked for: pairs of both, `[size, size, 1]` uint8.

    The 650 characters of `Glyphs` in all sixteen fonts. The label says both: the place of the
    font in `fonts`, times 650, and the place of the character. A tenth of the 10,400 pairs,
    by a hash, is held out: characters that were seen, in fonts that were, never together.

    >>> len(StyledGlyphs("train")), len(StyledGlyphs("pairs")), StyledGlyphs().num_classes
    (9357, 1043, 10400)

    Raises:
      InputError: another split, or matplotlib or Pillow is not installed.
    """

    split: str = "train"
    size: int = 64

    def __post_init__(self):
        _check(self, ("train", "pairs"))

    @property
    def fonts(self) -> tuple[str, ...]:
        """Names of the fonts, in the order in which labels count them."""
        return tuple(font for fonts in FAMILIES.values() for font in fonts)

    @property
    def num_classes(self) -> int:
        return len(self.fonts) * len(_shared())

    def label(self, character: str, font: str) -> int:
        """The label of a character in a font.

        Raises:
          InputError: a font that is none of these, or a character that not all of them have.
        """
        if font not in self.fonts or character not in _shared():
            raise InputError(
                f"{character!r} in {font} is no pair that is drawn; take a font of "
                f"{', '.join(self.fonts)} and a character that all of them have"
            )
        return self.fonts.index(font) * len(_shared()) + _shared().index(character)

    def __len__(self) -> int:
        return len(_pairs(self.split))

    def __getitem__(self, index: int) -> Record:
        label = _pairs(self.split)[index]
        font, character = divmod(label, len(_shared()))
        return _record(self.fonts[font], _shared()[character], self.size) | {"label": label}


def draw(font: str, character: str, size: int) -> np.ndarray:
    """The picture of `character` in a font of `FAMILIES`, uint8 `[size, size, 1]`.

    White on black, an em of 3/4 of `size` on a baseline at 3/4 of it, in the middle from
    left to right. What would stick out is moved in, and what is too large made smaller.
    """
    Image, ImageDraw, _ = _pillow()
    face = _face(font, round(_EM * size))
    left, top, right, bottom = face.getbbox(character, anchor="ms")
    large = max(right - left, bottom - top) / size
    if large > 1:
        face = _face(font, int(_EM * size / large))
        left, top, right, bottom = face.getbbox(character, anchor="ms")
    x = min(max(size // 2, -left), size - right)
    y = min(max(round(_BASELINE * size), -top), size - bottom)
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).text((x, y), character, fill=255, font=face, anchor="ms")
    return np.asarray(image)[..., None]


def _record(font: str, character: str, size: int) -> Record:
    name = f"glyphs[{font} U+{ord(character):04X}]"
    return {"image": draw(font, character, size), "source": name}


def _check(source: Glyphs | NamedGlyphs | StyledGlyphs, splits: tuple[str, ...]) -> None:
    kind = type(source).__name__
    for field, known in (("split", splits), ("held", tuple(FAMILIES))):
        value = getattr(source, field, "STIX")
        if value not in known:
            raise InputError(
                f"{kind} has no {field} {value!r}; choose one of {', '.join(known)}"
            )
    if source.size < 8:
        raise InputError(f"{kind} cannot draw size={source.size}; give 8 pixels or more")


@functools.cache
def _shared() -> tuple[str, ...]:
    """The characters that every font has, without those that look like another."""
    return _distinct(frozenset.intersection(*_named_characters().values()))


@functools.cache
def _characters() -> tuple[str, ...]:
    """The characters that any font has, without those that look like another."""
    return _distinct(frozenset.union(*_named_characters().values()))


@functools.cache
def _pairs(split: str) -> tuple[int, ...]:
    """The labels of a split of StyledGlyphs."""
    fonts = [font for fonts in FAMILIES.values() for font in fonts]
    return tuple(
        place * len(_shared()) + label
        for place, font in enumerate(fonts)
        for label, character in enumerate(_shared())
        if (zlib.crc32(f"{font}{character}".encode()) % 10 == 0) == (split == "pairs")
    )


@functools.cache
def _named(split: str, held: str) -> list[tuple[str, int]]:
    """Every (font, label) of a split of NamedGlyphs."""
    has, found = _named_characters(), []
    others = _other_fonts(held)
    trained = frozenset.union(*(has[font] for font in others))
    for label, character in enumerate(_characters()):
        unseen = zlib.crc32(character.encode()) % 10 == 0
        if unseen != (split in ("characters", "both")):
            continue
        if split == "fonts" and character not in trained:
            continue
        fonts = others if split in ("train", "characters") else FAMILIES[held]
        fonts = [font for font in fonts if character in has[font]]
        found += [(font, label) for font in (fonts if split == "train" else fonts[:1])]
    return found


def _other_fonts(held: str) -> tuple[str, ...]:
    return tuple(f for name, fonts in FAMILIES.items() if name != held for f in fonts)


@functools.cache
def _named_characters() -> dict[str, frozenset[str]]:
    """What characters with a name each font has."""
    return {
        font: frozenset(
            chr(code)
            for code in _ft2font().FT2Font(_path(font)).get_charmap()
            if unicodedata.name(chr(code), "")
        )
        for fonts in FAMILIES.values()
        for font in fonts
    }


def _distinct(characters: Iterable[str]) -> tuple[str, ...]:
    """In order, without blanks and what any font draws with the outline of one before."""
    has, unscaled = _named_characters(), _ft2font().LoadFlags.NO_SCALE
    faces = {font: _ft2font().FT2Font(_path(font)) for font in has}
    seen, kept = set(), []
    for character in sorted(characters):
        outlines = set()
        for font in has:
            if character in has[font]:
                faces[font].load_char(ord(character), flags=unscaled)
                points, codes = faces[font].get_path()
                outlines.add((font, points.tobytes(), codes.tobytes()))
        blank = any(not points for _, points, _ in outlines)
        if not blank and not outlines & seen:
            seen |= outlines
            kept.append(character)
    return tuple(kept)


@functools.lru_cache(maxsize=256)
def _face(font: str, em: int):
    ImageFont = _pillow()[2]
    return ImageFont.truetype(_path(font), em, layout_engine=ImageFont.Layout.BASIC)


def _path(font: str) -> str:
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf"


def _ft2font():
    try:
        from matplotlib import ft2font
    except ImportError:
        raise InputError(_MISSING.format("matplotlib")) from None
    return ft2font


def _pillow():
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise InputError(_MISSING.format("Pillow")) from None
    return Image, ImageDraw, ImageFont


_MISSING = 'drawing characters needs {}; run pip install "jaxformer[train]"'
