import pytest

from evaluate.speed import dit
from jaxformer.models.dit import Size


@pytest.mark.slow
def test_both_modes_are_timed_and_counted(monkeypatch):
    monkeypatch.setitem(dit.dit.SIZES, "S", Size(24, 1, 3))
    monkeypatch.setattr(dit, "LATENTS", (4, 4, 4))
    monkeypatch.setattr(dit, "torchs", lambda *_: None)
    found = dit.run(rounds=2, sizes=("S/2",), batch=2, steps=3, peak=1.0)
    assert [(r["mode"], r["side"]) for r in found["rows"]] == [
        ("train", "ours"),
        ("sample", "ours"),
    ]
    work = dit.dit.flops(dit.dit.named("S/2", learned_variance=True), (4, 4, 4))
    assert found["clock"] == "wall" and found["peak_tflops"] == 1
    for row, passes in zip(found["rows"], (3, 6), strict=True):
        rate = 2 * work * passes / row["median_ms"] * 1e3
        assert abs(row["gflops"] * 1e9 / rate - 1) < 1e-6
        assert abs(row["mfu"] * 1e12 / rate - 1) < 1e-6
        assert row["compiled_bytes"] > 0
    how = {"rounds": 1, "sizes": ("S/2",), "modes": ("train",), "batch": 1, "peak": 1.0}
    alone = dit.run(**how, sides=("diffusers",))
    assert alone["rows"] == []
