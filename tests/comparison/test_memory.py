"""Peak memory counts what was allocated since the start, even if it is free again, and nothing from before."""

import pytest
import torch

from lightsft.comparison.memory import PeakMemory

SIZE = 200 * 2**20


def allocate(size=SIZE):
    return torch.ones(size // 4).sum().item()


def test_the_peak_sees_an_allocation_that_is_free_again():
    memory = PeakMemory(torch.device("cpu"))
    allocate()
    assert memory.peak_bytes() == pytest.approx(SIZE, rel=0.1)


def test_the_peak_forgets_what_was_before():
    allocate()
    memory = PeakMemory(torch.device("cpu"))
    assert memory.peak_bytes() < SIZE / 4


def test_the_peak_is_the_highest_point_and_not_the_sum():
    memory = PeakMemory(torch.device("cpu"))
    allocate()
    allocate(SIZE // 2)
    assert memory.peak_bytes() == pytest.approx(SIZE, rel=0.1)
