"""The kernels take no more instructions than agreed."""

from __future__ import annotations

import platform
import sys

import pytest

from benchmarks.instructions import baselines, build, count_instructions
from tael.backends.cpu.backend import chosen_isa

TOLERANCE = 0.05
NOISE = 500
"""Instructions that malloc and Python take around a call, now more and now less."""

HOW_TO_AGREE = "if that is on purpose, run: python -m benchmarks.instructions --update"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NOT CHECKED: instructions are counted on Linux on x86-64 only",
)
def test_no_kernel_takes_more_instructions() -> None:
    isa = chosen_isa()
    agreed = baselines().get(build(isa))
    if agreed is None:
        pytest.skip(f"NOT CHECKED: no instruction counts are agreed on for {build(isa)}")
    try:
        counts = count_instructions(isa)
    except PermissionError as error:
        pytest.skip(f"NOT CHECKED: instructions cannot be counted: {error}")
    assert counts.keys() == agreed.keys(), HOW_TO_AGREE
    slower = [
        f"{cell}: {counts[cell]:,} instructions, {counts[cell] / agreed[cell] - 1:+.0%}"
        for cell in agreed
        if counts[cell] > (1 + TOLERANCE) * agreed[cell] + NOISE
    ]
    assert not slower, f"{'; '.join(slower)}; {HOW_TO_AGREE}"
