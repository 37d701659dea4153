import itertools

import pytest

from evaluate.speed import vit
from jaxformer.models.vit import Size


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(vit.vit.SIZES, "Ti", Size(16, 1, 24, 2))
    monkeypatch.setattr(vit, "PIXELS", 32)
    monkeypatch.setattr(vit, "process_bytes", lambda *_: 5)
    monkeypatch.setattr(vit, "has_torch", lambda: False)


@pytest.mark.slow
def test_both_modes_are_timed_and_counted(tiny):
    found = vit.run(rounds=2, sizes=("Ti/16",), batch=2, remats=("dots",), peak=1.0)
    assert [(r["mode"], r["side"]) for r in found["rows"]] == [
        ("train", "ours, remat=dots"),
        ("infer", "ours"),
    ]
    T, D, F = 5, 16, 24
    layer = 4 * T * D * D + 2 * T * T * D + 2 * T * D * F
    work = 2 * (4 * 16 * 16 * 3 * D + layer + D * 1000)  # At 224 pixels it would be more.
    for row, passes in zip(found["rows"], (3, 1), strict=True):
        rate = 2 * work * passes / row["median_ms"] * 1e3
        assert abs(row["gflops"] * 1e9 / rate - 1) < 1e-6
        assert abs(row["mfu"] * 1e12 / rate - 1) < 1e-6
        assert row["compiled_bytes"] > 0 and row["process_bytes"] == 5
    assert found["peak_source"] == "told" and found["clock"] == "wall"


def test_sides_are_timed_in_turns_by_the_clock_that_is_named(monkeypatch, tiny):
    turns = []
    monkeypatch.setattr(vit, "has_torch", lambda: True)
    monkeypatch.setattr(vit, "made", lambda *a: (lambda: turns.append(a[-1]), 7))
    # A step of ours takes 1 second of this clock, one of torch's 2: 3 a turn.
    ticks = itertools.cycle((0, 1, 1, 3))
    monkeypatch.setitem(vit.CLOCKS, "cpu", lambda: next(ticks))
    monkeypatch.setattr(vit, "fastest_product", lambda dtype, clock: (8e9, "a product"))
    found = vit.run(rounds=3, sizes=("Ti/16",), modes=("infer",), batch=4, clock="cpu")
    assert turns[-6:] == ["ours", "torch"] * 3
    ours, theirs = found["rows"]
    assert (ours["median_ms"], theirs["median_ms"]) == (1000, 2000)
    assert (ours["ratio_to_torch"], ours["images_per_second"]) == (0.5, 4)
    assert ours["mfu"] == 2 * theirs["mfu"] == ours["gflops"] / 8
    assert found["peak_source"] == "a product"


def test_a_cpu_s_peak_is_that_of_the_fastest_product(monkeypatch, tiny):
    monkeypatch.setattr(vit, "PRODUCT", 64)
    # Calls take 3 and 2 seconds, in turns, and 1 second lies between them.
    ticks = itertools.accumulate(itertools.chain([0], itertools.cycle((3, 1, 2, 1))))
    rate, source = vit.fastest_product("float32", lambda: next(ticks))
    assert rate == 2 * 64**3 / 2
    assert "XLA's" in source
