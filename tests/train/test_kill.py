"""`kill -9` at random moments, each time restarted: the same parameters, bit for bit."""

import pytest

from train.faults import kill


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    found = kill.killed(tmp_path, kills=10)
    print(found.shown)
    assert not found.wrong
