import flax.linen as nn
import numpy as np
import pytest

from evaluate.run import Trained
from evaluate.seen import Seen
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline, eval_batches
from jaxformer.data.sources import Digits
from jaxformer.errors import InputError
from jaxformer.sharding import FSDP_TENSOR


class Rows(nn.Module):
    """Sees a picture as its rows."""

    def encode(self, image):
        return 2 * image[..., 0]


class Toy:
    name = "rows"

    def __init__(self, known=True):
        self.known = known

    def check(self):
        if not self.known:
            raise InputError("nobody looks")

    def load(self, mesh):
        model = Rows()
        return Trained(model.apply, {}, mesh, FSDP_TENSOR, 256, model), (Normalize(0.5),)


def test_each_record_has_what_the_encoder_sees_of_its_own_picture():
    """By the encoder's transforms, not by those of the pipeline."""
    digits = Digits("test")
    source = Seen(digits, Toy())
    assert len(source) == 360 and source.num_classes == 10
    for i in (0, 217, 359):
        wanted = 2 * (digits[i]["image"][..., 0] - 0.5)
        np.testing.assert_allclose(source[i]["seen"], wanted, atol=1e-6)
        assert source[i]["label"] == digits[i]["label"]
    batch = next(iter(eval_batches(Pipeline(source, (Normalize(9.0),)), batch_size=4)))
    np.testing.assert_allclose(batch["seen"], 2 * (batch["image"][..., 0] + 8.5), atol=1e-5)


def test_an_encoder_that_is_not_there_is_told():
    with pytest.raises(InputError, match="nobody looks"):
        Seen(Digits("test"), Toy(known=False)).check()
