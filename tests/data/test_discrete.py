"""Images as tokens among text: there and back, and what is no image is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.discrete import Vocabulary
from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder
from jaxformer.models.vae import VQAutoencoder
from jaxformer.objectives.next_token import NextToken

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("lines", [True, False])
def test_images_among_text_come_back(lines):
    law = Vocabulary(text=20, codes=7, lines=lines)
    images = [DRAW.integers(0, 7, shape) for shape in ((3, 3), (2, 2))]
    text = DRAW.integers(0, 20, 5)
    ids = np.concatenate([text, law.encode(images[0]), text, law.encode(images[1]), text])
    assert ids.max() < law.vocab == 30 and (ids == law.begin).sum() == 2
    assert len(law.encode(images[0])) == 9 + 2 + 3 * lines
    for found, image in zip(law.decode(ids), images, strict=True):
        np.testing.assert_array_equal(found, image)
    wide = DRAW.integers(0, 7, (2, 6))
    np.testing.assert_array_equal(law.decode(law.encode(wide), columns=6)[0], wide)
    assert law.decode(text) == []


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([10, 13, 13], "the image at id 0 has 0 ids"),
        ([3, 10, 13, 14, 13, 11, 14, 12], "at id 1 has 5 ids, which are no rows of 4"),
        ([10, 13, 14, 11, 14, 14, 14, 12], "has text or a line's end among its codes"),
        ([10, 13, 5, 11, 12], "has text or a line's end among its codes"),
    ],
)
def test_what_is_no_image_is_told(ids, said):
    with pytest.raises(InputError, match=said):
        Vocabulary(text=10, codes=2).decode(np.array(ids))


def test_codes_of_another_codebook_are_told():
    with pytest.raises(InputError, match="codes from 0 to 4 are not of the 4 that"):
        Vocabulary(text=10, codes=4).encode(np.array([[0, 4]]))
    with pytest.raises(InputError, match="text=0 and codes=4 must be 1 or more"):
        Vocabulary(text=0, codes=4)


@pytest.mark.slow  # Compiles a program or two.
def test_a_decoder_learns_text_and_image_at_once():
    """An autoencoder's codes behind a word for each image: the loss falls for both."""
    coder = VQAutoencoder(widths=(8, 8), depth=1, channels=1, latent=4, codes=6, groups=4)
    pictures = jnp.asarray(DRAW.random((2, 8, 8, 1)), jnp.float32)
    variables = jax.jit(coder.init)(jax.random.key(0), pictures)
    codes = np.asarray(jax.jit(lambda x: coder.apply(variables, x, method="encode"))(pictures))
    law = Vocabulary(text=5, codes=6)
    tokens = jnp.stack([jnp.array([i, *law.encode(c)]) for i, c in enumerate(codes, 1)])
    model = Decoder(vocab=law.vocab, width=16, depth=1, mlp_dim=24, num_heads=2)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    objective = NextToken(chunk=None)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens)}

    @jax.jit
    def step(params):
        loss, slope = jax.value_and_grad(
            lambda p: objective.loss(model.apply, p, batch, jax.random.key(2))[0]
        )(params)
        return loss, jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)

    losses = []
    for _ in range(60):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    images = coder.apply(
        variables, jnp.asarray(law.decode(np.asarray(tokens[0]))[0])[None], method="decode"
    )
    same = coder.apply(variables, jnp.asarray(codes[:1]), method="decode")
    np.testing.assert_array_equal(images, same)
