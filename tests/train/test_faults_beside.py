"""Rows of the table of faults that bear the company of other tests."""

import pytest

from train.faults import damage, memory, meshes


@pytest.mark.slow
def test_damage_is_found(tmp_path):
    found = damage.damaged(tmp_path, flips=10)
    assert not found.wrong, found.shown


@pytest.mark.slow
@pytest.mark.parametrize("family", meshes.FAMILIES)
def test_losses_are_the_same_where_a_sequence_is_split_too(family):
    found = meshes.same_losses((family,), ("fsdp=2,tensor=2,seq=2",))
    assert not found.wrong, found.shown


@pytest.mark.slow
def test_a_plan_knows_the_temporaries():
    found = memory.beside_truth(memory.CASES[:1])
    assert not found.wrong, found.shown
