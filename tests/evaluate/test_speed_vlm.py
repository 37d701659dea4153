import pytest

from evaluate.speed import decoder, vlm
from jaxformer.models.decoder import Decoder
from jaxformer.models.vit import Size

ROWS = {"a": [2.0, 4.0, 8.0], "b": [1.0, 4.0, 2.0]}


def test_a_row_tells_the_medians_and_their_ratio():
    first, last = decoder.told("train", ROWS, work=12, operations=10**9, top=1e9)
    assert first["median_ms"] == 4000 and first["min_ms"] == 2000
    assert first["tokens_per_second"] == 3 and first["ratio_to_b"] == 2
    assert last["gflops"] == 0.5 and last["mfu"] == 0.5 and "ratio_to_b" not in last
    seconds = {"prefill": {"a": [1.0, 1.0]}, "decode": {"a": [3.0, 1.0]}}
    decoder.less_first(seconds)
    assert seconds["decode"]["a"] == [2.0, 1e-9]


@pytest.mark.slow
def test_a_model_that_sees_is_timed_and_counted(monkeypatch):
    small = Decoder(11, 8, 1, 12, 2, tied=False)
    monkeypatch.setattr(decoder, "MODEL", small)
    monkeypatch.setattr(vlm, "TOWER", Size(12, 2, 16, 2))
    monkeypatch.setattr(vlm, "IMAGE", 10)
    found = vlm.run(rounds=2, batch=2, prompt=4, steps=3, peak=1.0)
    ours = [row["what"] for row in found["rows"] if row["side"] == "ours"]
    assert ours == ["train", "prefill", "decode"]
    row = found["rows"][0]
    rate = 3 * 2 * vlm.flops(68) / row["median_ms"] * 1e3
    assert abs(row["gflops"] * 1e9 / rate - 1) < 1e-6
    assert row["tokens_per_second"] == pytest.approx(2 * 68 / row["median_ms"] * 1e3)


@pytest.mark.slow
def test_a_model_of_text_is_timed_and_counted(monkeypatch):
    monkeypatch.setattr(decoder, "MODEL", Decoder(11, 8, 1, 12, 2, tied=False))
    monkeypatch.setattr(decoder, "MANY", 4)
    monkeypatch.setattr(decoder, "torchs", lambda *_: {})
    found = decoder.run(rounds=1, batch=2, prompt=8, steps=8, peak=1.0)
    assert found["peak_source"] == "told" and found["peak_tflops"] == 1.0
    sides = [(row["what"], row["side"]) for row in found["rows"]]
    assert ("train", "ours") in sides and ("speculative", "lookup") in sides
