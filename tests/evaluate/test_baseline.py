"""The baselines are fitted on one split and counted on the other."""

import json

from evaluate import baseline


def test_digits_by_pixels(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert baseline.main(["digits", "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "digits: 1437 images of 10 classes to learn from, 360 to test"
    rows = json.loads(out.read_text())["baselines"]
    assert len(rows) == 3 == len(printed) - 1
    for row, line in zip(rows, printed[1:], strict=True):
        assert row["top1"] == row["right"] / 360 and row["baseline"] in line
        assert 0.93 < row["top1"] < 1


def test_glyphs_hold_out_the_family_that_is_named():
    train, test = baseline.sources("glyphs", "Mono")
    assert "Mono" not in train[0]["source"] and "DejaVuSansMono" in test[0]["source"]


def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baseline, "baselines", lambda train, test: iter(()))
    (tmp_path / "file").write_text("")
    assert baseline.main(["digits", "--json", str(tmp_path / "file" / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
