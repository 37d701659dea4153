"""The command that finds the clipped schedule of least variance, of a tiny model."""

import json
import types

import numpy as np
import pytest

from evaluate import clips
from evaluate.generate import Records
from jaxformer.data.loader import Pipeline
from jaxformer.objectives.next_token import NextToken
from jaxformer.objectives.unmask import Unmask
from tests.objectives.test_unmask import MODEL, case


@pytest.mark.slow
def test_the_least_of_all_variances_is_told(tmp_path, capsys, monkeypatch):
    tokens, params = case()
    rows = Records([{"tokens": np.asarray(row)} for row in tokens])
    made = types.SimpleNamespace(
        model=MODEL,
        objective=Unmask(11, block=2, shift=True, chunk=None),
        evals={"test": Pipeline(rows)},
    )
    monkeypatch.setattr(clips, "load", lambda path, overrides: made)
    monkeypatch.setattr(clips, "restored", lambda experiment, run: (3, run, params))
    file = tmp_path / "clips.json"
    argv = ["configs/x.py", "--rows", str(len(tokens)), "--step", "0.5", "--json", str(file)]
    assert clips.main(argv) == 0
    found = json.loads(file.read_text())
    assert (found["config"], found["step"], found["rows"]) == ("configs/x.py", 3, len(tokens))
    told = [one["variance"] for one in found["schedules"]]
    assert told == sorted(told) and len(told) == 3 and told[0] > 0
    first, last = capsys.readouterr().out.splitlines()[:: len(told)]
    low, high = found["schedules"][0]["low"], found["schedules"][0]["high"]
    assert first.startswith(f"{low:.3f} to {high:.3f} masked: variance {told[0]:.4g}")
    assert last.startswith("0.001 to 1.000 masked: variance")
    made.objective = NextToken()
    assert clips.main(argv) == 2
    assert "NextToken has no times of masking" in capsys.readouterr().err
