"""Every network learns: its cheap form, from random weights, reads handwritten digits."""

import pytest

from benchmarks.learning import FORMS, GOAL, learn
from flax_nets import registry


def test_no_file_of_networks_is_left_out():
    assert {registry.resolve(name).file for name in FORMS} == set(registry.FILES)


@pytest.mark.parametrize("name", FORMS)
def test_it_reads_held_out_digits(name):
    assert learn(name).accuracy[-1] >= GOAL
