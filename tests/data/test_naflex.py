import doctest

import numpy as np
import pytest

from jaxformer.data import naflex
from jaxformer.data.loader import Pipeline, eval_batches, train_batches
from jaxformer.data.naflex import FitPatches, JoinRows, best_grid
from jaxformer.errors import InputError

SHAPES = [(8, 16), (30, 9), (5, 5), (12, 40)]


class Shapes:
    """Images of four shapes."""

    num_classes = 4

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = np.random.default_rng(index).random((*SHAPES[index], 3)).astype(np.float32)
        return {"image": image, "label": index, "source": f"shapes[{index}]"}


def test_the_example():
    assert not doctest.testmod(naflex).failed


# (rows, columns) of images of patches of 16 that SigLIP 2's own code finds.
@pytest.mark.parametrize(
    ("shape", "length", "grid"),
    [
        ((480, 640), 256, (14, 18)),
        ((640, 480), 256, (18, 14)),
        ((1000, 1000), 256, (16, 16)),
        ((20, 2000), 64, (1, 64)),
        ((333, 777), 128, (7, 17)),
        ((61, 1999), 784, (5, 156)),
    ],
)
def test_grids_are_those_of_the_original(shape, length, grid):
    found = best_grid(shape, length)
    assert found == grid


def test_a_pipeline_makes_rows_of_several_images():
    transforms = (FitPatches(4, 12),)
    (alone,) = eval_batches(Pipeline(Shapes(), transforms), batch_size=4)
    assert alone["patches"].shape == (4, 12, 48)
    grids = alone["grids"][:, 0].tolist()
    assert grids == [list(best_grid(shape, 12)) for shape in SHAPES]

    joined = JoinRows(2, length=22)({k: np.asarray(v) for k, v in alone.items()})
    assert joined["patches"].shape == (2, 22, 48)
    assert joined["grids"].tolist() == [grids[:2], grids[2:]]
    assert (joined["label"] == alone["label"]).all()
    n = np.prod(grids, axis=1)
    row = np.concatenate([alone["patches"][2, : n[2]], alone["patches"][3, : n[3]]])
    assert (joined["patches"][1, : n[2] + n[3]] == row).all()
    assert not joined["patches"][1, n[2] + n[3] :].any()

    batches = train_batches(
        Pipeline(Shapes(), transforms, (JoinRows(2),)), batch_size=4, seed=0
    )
    assert next(batches)["patches"].shape == (2, 24, 48)
    batches.close()


def test_rows_that_cannot_be_are_refused():
    (alone,) = eval_batches(Pipeline(Shapes(), (FitPatches(4, 12),)), batch_size=4)
    with pytest.raises(InputError, match="count=3 must divide the batch of 4 images"):
        JoinRows(3)(alone)
    with pytest.raises(InputError, match=r"4 images have \d+ patches and a row length=20"):
        JoinRows(4, length=20)(alone)
    with pytest.raises(InputError, match="an image of 0 x 4 pixels has no grid"):
        best_grid((0, 4), 12)
