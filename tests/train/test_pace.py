"""Slow steps are told with the name of the host that was late, or that none was."""

import json
import time

import matplotlib.image
import pytest

from train import report
from train.faults import signals
from train.pace import Pace, slow

USUAL, SLOW = 0.5, 4.0


@pytest.mark.parametrize(
    ("seconds", "own", "late"),
    [
        (SLOW, 3.7, 3.6),  # Its own doing.
        (SLOW, 0.1, 0.0),  # It waited for another.
        (1.4, 1.2, None),  # Not a second above what is usual.
        (USUAL, 0.1, None),
    ],
)
def test_a_step_is_slow_beside_those_before(tmp_path, seconds, own, late):
    pace = Pace(tmp_path)
    assert pace.seen(1, 60.0, 60.0) is None, "nothing is usual yet"
    for step in range(2, 12):
        assert pace.seen(step, USUAL, 0.1) is None
    for _ in range(2):  # What is slow does not become usual.
        row = pace.seen(12, seconds, own)
        assert (row and round(row["late"], 6)) == late
        assert row is None or (row["seconds"], row["usual"]) == (SLOW, USUAL)


def test_time_is_told_apart_by_who_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(Pace, "seen", lambda self, *told: print(*map("{:.1f}".format, told)))
    with Pace(tmp_path) as pace:
        pace.resume()
        with pace.waiting():
            time.sleep(0.2)
        mark = pace.mark
        pace.step(1)
        assert pace.mark - mark >= 0.2
        with pace.waiting():
            time.sleep(0.3)
            pace.still += 0.3  # As the pulse counts where the process stood still.
        assert pace.waited < 0.2


def test_the_report_names_hosts_and_draws(tmp_path, capsys):
    row = {"seconds/all": 10.0, "seconds/compile": 4.0, "seconds/input": 1.0}
    rows = [row, row | {"seconds/compile": 0.0, "seconds/lost": 5.0}]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"step": 1} | r) for r in rows)
    )
    assert slow(tmp_path) == []
    for process, late in ((0, (0.0, 0.1)), (1, (3.0,))):
        (tmp_path / f"slow.{process}.jsonl").write_text(
            "".join(
                json.dumps(
                    {"step": i, "host": f"h{process}", "process": process, "seconds": 4.0,
                     "usual": 0.5, "late": t}
                ) + "\n"
                for i, t in enumerate(late)
            )
        )  # fmt: skip
    assert report.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "slow steps: 2, 7.0 s above what is usual" in told
    assert "h1 (process 1) was late in 1, by 3.0 s" in told and "in 1 no host was late" in told
    assert "goodput, the share of steps that were kept: 45.0%" in told
    assert matplotlib.image.imread(tmp_path / "goodput.png").std() > 0


@pytest.mark.slow
def test_a_host_that_stood_still_is_named(tmp_path):
    found = signals.late(tmp_path / "run")
    print(f"\n{found.shown}")
    assert not found.wrong
