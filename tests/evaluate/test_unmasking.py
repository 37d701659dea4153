import pathlib
import re

import matplotlib.image
import numpy as np

from evaluate import unmasking
from evaluate.unmasking import WIDTH, Piece, animation, picture, pieces
from jaxformer.data.tokenizer import Bytes

FOUND = [Piece("if a", -1), Piece(" <", 2), Piece(" b:\n", 0), Piece("x" * (WIDTH + 5), 1)]


def test_tokens_are_told_by_the_step_that_showed_them():
    ids, shown = np.array([97, 10, 98]), np.array([-1, 1, 0])
    assert pieces(ids, shown, Bytes()) == [("a", -1), ("\n", 1), ("b", 0)]


def test_lines_end_where_texts_and_the_page_do():
    found = list(unmasking._lines(FOUND))
    assert found == [
        (0, 0, "if a", -1),
        (0, 4, " <", 2),
        (0, 6, " b:", 0),
        (1, 0, "x" * WIDTH, 1),
        (2, 0, "x" * 5, 1),
    ]


def test_a_picture_has_a_colour_for_each_step(tmp_path):
    path = picture(FOUND, tmp_path / "a" / "picture.png")
    image = matplotlib.image.imread(path)[..., :3]
    colors = matplotlib.colormaps["viridis"]
    for step in range(3):
        near = np.abs(image - np.array(colors(step / 2)[:3])).max(-1) < 0.01
        assert near.sum() > 50, step


def test_a_page_stands_by_itself(tmp_path):
    page = animation(FOUND, tmp_path / "page").read_text()
    spans = re.findall(r'<span style="--s:(\d)">(.*?)</span>', page, re.DOTALL)
    assert spans == [("2", " &lt;"), ("0", " b:\n"), ("1", "x" * (WIDTH + 5))]
    assert "http" not in page and 'max="3"' in page and "if a<span" in page


def test_a_config_without_holes_is_told(capsys):
    config = pathlib.Path(unmasking.__file__).parents[1] / "configs" / "vit_digits.py"
    assert unmasking.main([str(config), "--checkpoint", "none"]) == 2
    assert "has no task that is Infill with a mask_id; add one" in capsys.readouterr().err
