"""The table of faults, and rows of it that need the machine for themselves.

Those that do not are in `test_faults_beside.py`; `python -m train.faults` has all.
"""

import json
import pathlib
import subprocess

import pytest

import train.faults.__main__ as faults
from train.faults import disk, elastic, evaluation
from train.faults.row import Row, wrongs


def fog(folder):
    raise RuntimeError("seen no more")


def test_the_table_says_what_is_not_so(monkeypatch, tmp_path, capsys):
    good = Row("rain", "dry", wrongs(it_is_dry=True))
    bad = Row("snow", "wet", wrongs(it_is_dry=False, it_is_warm=True))
    monkeypatch.setattr(faults, "ROWS", {"rain": lambda _: good, "snow": lambda _: bad})
    out = tmp_path / "faults.json"
    assert faults.main(["--json", str(out)]) == 1
    told = capsys.readouterr().out
    assert "| rain | dry | `rain` |" in told and "    not so: it is dry" in told
    assert [row["wrong"] for row in json.loads(out.read_text())["rows"]] == [[], ["it is dry"]]
    assert faults.main(["--rows", "rain"]) == 0
    monkeypatch.setattr(faults, "ROWS", {"fog": fog, "rain": lambda _: good})
    assert faults.main([]) == 1
    assert (
        "| fog | not shown: RuntimeError: seen no more | `fog` |\n| rain | dry |"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(faults, "ROWS", {"rain": lambda _: good, "snow": lambda _: bad})
    assert faults.main(["--rows", "hail"]) == 2
    assert "there is no row 'hail'; choose from rain, snow" in capsys.readouterr().err


def test_rows_that_are_made_together_are_told_as_alone(monkeypatch, tmp_path, capsys):
    """Each by a process of its own; one that ends without a row is told too."""
    monkeypatch.setattr(faults.subprocess, "run", ended)
    monkeypatch.setattr(faults, "ROWS", dict.fromkeys(["rain", "snow", "fog"]))
    out = tmp_path / "faults.json"
    assert faults.main(["--together", "2", "--json", str(out)]) == 1
    told = capsys.readouterr().out
    assert (
        "| rain | seen | `rain` |\n| snow | seen | `snow` |\n| fog | not shown: status 9 of"
        in told
    )
    found = json.loads(out.read_text())
    assert found["cpu_seconds"] == 6 and [row["row"] for row in found["rows"]] == [*faults.ROWS]
    assert faults.main(["--together", "0"]) == 2
    assert faults.main(["--kills", "0"]) == 2


def test_kills_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(
        faults, "ROWS", {"kill": lambda _, kills: Row("kill", f"{kills} times")}
    )
    assert faults._made("kill", 7)["shown"] == "7 times"


def ended(command, **options):
    """A process that makes a row, but for the fog."""
    name, out = command[4], command[-1]
    row = {"fault": name, "shown": "seen", "wrong": [], "row": name}
    if name != "fog":
        row |= {"seconds": 3.0, "cpu_seconds": 3.0}
        pathlib.Path(out).write_text(json.dumps({"rows": [row]}))
    return subprocess.CompletedProcess(command, 9, "", "lost")


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    found = disk.full(tmp_path)
    assert not found.wrong, found


@pytest.mark.slow
def test_processes_come_and_go(tmp_path):
    found = elastic.same_losses(tmp_path, leg=2)
    assert not found.wrong, found.shown


@pytest.mark.slow
def test_processes_judge_alike(tmp_path):
    found = evaluation.on_processes(tmp_path)
    assert not found.wrong, found.shown
