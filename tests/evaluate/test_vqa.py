import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate import ruled
from evaluate.run import Trained, check
from evaluate.vqa import VQA
from jaxformer import sharding
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.scenes import KINDS, VOCAB, Ask, Scenes
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.vqa import Dialogues
from jaxformer.errors import InputError
from jaxformer.experiment import load, override


def test_an_answer_counts_where_all_of_it_is_right():
    """By a model that knows the row, but for the tokens after those that it is told."""
    test = Pipeline(Scenes("test", 6), (Normalize(), Ask(places=8, length=57)))
    made = [test.transforms[1](test.transforms[0](test.source[i])) for i in range(6)]
    read = 2 + list(KINDS).index("read")
    spoilt = [
        # The end of an answer, the first token of one, and a token of a question.
        (0, int(np.flatnonzero(made[0]["segments"] == 2)[-2])),
        (
            1,
            int(np.flatnonzero((made[1]["segments"] == read) & (made[1]["answer"] == 1))[0])
            - 1,
        ),
        (2, int(np.flatnonzero(made[2]["segments"] == 3)[1])),
    ]
    wrong = np.zeros((6, 57), bool)
    wrong[tuple(np.transpose(spoilt))] = True
    keys = jnp.asarray([row["tokens"] for row in made])

    def apply(variables, *inputs, method, **options):
        if method == "logits":
            return jax.nn.one_hot(inputs[0][..., 0].astype(int), VOCAB)
        tokens = inputs[0]
        own = (tokens[:, None] == keys[None]).all(2)  # Which row it is.
        bad = (own.astype(jnp.float32) @ wrong.astype(np.float32)) > 0
        return jnp.where(bad, 0, jnp.roll(tokens, -1, 1))[..., None].astype(jnp.float32)

    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    trained = Trained(apply, {}, mesh, sharding.DATA_PARALLEL, batch_size=4)
    task = VQA(test)
    found = {name: (int(m.sum), int(m.count)) for name, m in task.run(trained).items()}
    assert found == {
        "left": (5, 6),
        "right": (6, 6),
        "read": (5, 6),
        "largest": (6, 6),
        "count": (6, 6),
        "sum": (6, 6),
        "reading": (16, 18),
        "all": (34, 36),
    }


def test_faults_of_a_dataset_are_told_before_any_step(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"id": 3, "image": "none.png", "conversations": []}\n')
    talk = Dialogues(str(path), str(tmp_path), Bytes(), 40, 258, 4, (8, 8, 3))
    experiment = load("configs/vlm_digits.py")
    experiment = dataclasses.replace(experiment, data=Pipeline(talk))
    experiment = override(experiment, "model.language.vocab=259")
    with pytest.raises(
        InputError, match=r"2 faults in 1 lines(.|\n)*talk.jsonl:1 \(sample 3\)"
    ):
        check(experiment)


def test_rules_lie_above_words():
    found = list(ruled.baselines(Scenes("train", 200), Scenes("test", 100)))
    words, nearest, vectors = (row["kinds"] for row in found)
    assert all(words[kind][1] == 100 for kind in KINDS)
    assert words["reading"] == (sum(words[k][0] for k in ("left", "right", "read")), 300)
    assert words["reading"][0] < 80 and words["count"][0] >= 30
    for kinds in (nearest, vectors):
        assert kinds["reading"][0] > 280 and kinds["all"] == (
            sum(kinds[k][0] for k in KINDS),
            600,
        )
