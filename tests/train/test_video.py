"""A video transformer is trained and judged by the programs that images are."""

import json
import pathlib

import pytest

import evaluate.__main__
import train.__main__

CONFIG = """
import dataclasses

import numpy as np

from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.sources import Digits
from jaxformer.experiment import Experiment
from jaxformer.models.video import ViViT, flops
from jaxformer.objectives.classify import Classify
from jaxformer.optim import AdamW, Constant


@dataclasses.dataclass(frozen=True)
class Drift:
    '''Digits that drift by a pixel a frame, to the left or to the right.'''

    split: str = "train"
    num_classes: int = 2

    def __len__(self):
        return 40

    def __getitem__(self, index):
        record, label = Digits(self.split)[index], index % 2
        steps = [(2 * label - 1) * i for i in range(4)]
        frames = np.stack([np.roll(record["image"], n, 1) for n in steps])
        return {"image": frames, "label": label, "source": record["source"]}


def experiment():
    return Experiment(
        model=ViViT(16, 1, 24, 2, patch=4, tubelet=2, num_classes=2, attention="blocks"),
        objective=Classify(),
        optimizer=AdamW(Constant(3e-3)),
        data=Pipeline(Drift(), (Normalize(0.3, 0.4),)),
        evals={"test": Pipeline(Drift("test"), (Normalize(0.3, 0.4),))},
        steps=30,
        batch_size=16,
        eval_every=30,
        flops=flops,
    )
"""


@pytest.mark.slow
def test_a_video_model_trains_and_is_evaluated(tmp_path, capsys):
    config, run, out = tmp_path / "config.py", tmp_path / "run", tmp_path / "out.json"
    config.write_text(CONFIG)
    assert train.__main__.main([str(config), "--workdir", str(run)]) == 0
    assert pathlib.Path(run / "curves.png").exists()
    argv = [str(config), "--checkpoint", str(run), "--json", str(out)]
    assert evaluate.__main__.main(argv) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())["evals"]["test"]["top1"]
    assert found["count"] == 40 and found["value"] > 0.9  # Time has to be seen for that.
