"""What `python -m evaluate.speed stdlib` makes of a run's log."""

from evaluate.speed import stdlib


def logged():
    """Rows as a run writes them: a step's, an evaluation's, and that of the last tasks."""
    return [
        {"step": 10, "loss": 2.0, "seconds/cpu": 3.0},
        {"step": 20, "loss": 1.5, "seconds/cpu": 2.0},
        {"step": 20, stdlib.SCORE: 2.5, "seconds/cpu": 9.0},
        {"step": 30, "loss": 1.0, "seconds/cpu": 2.0},
        {"step": 30, stdlib.SCORE: 2.0, "seconds/cpu": 9.0},
        {"step": 30, "eval/held_out/bits_per_byte": 1.9, "seconds/cpu": 20.0},
    ]


def test_a_curve_counts_the_seconds_of_training_alone():
    assert stdlib.curve(logged()) == [
        {"step": 20, "cpu_seconds": 5.0, "bits_per_byte": 2.5},
        {"step": 30, "cpu_seconds": 7.0, "bits_per_byte": 2.0},
    ]


def test_a_table_tells_the_end_and_what_ten_minutes_give():
    points = stdlib.curve(logged())
    points[1] |= {"cpu_seconds": 601.0}
    rows = [{"optimizer": "Muon", "seed": seed, "curve": points[seed:]} for seed in (1, 0)]
    assert stdlib.table(rows).splitlines()[2:] == [
        "| Muon | 0 | 30 | 601 | 2.000 | 2.500, step 20 |",
        "| Muon | 1 | 30 | 601 | 2.000 |  |",
    ]


def test_a_picture_is_drawn_of_all_runs(tmp_path):
    rows = [{"optimizer": name, "curve": stdlib.curve(logged())} for name in stdlib.CONFIGS]
    stdlib.draw([{"rows": rows}, {"rows": rows[:1]}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
