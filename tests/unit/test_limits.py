"""The limits of this machine."""

from __future__ import annotations

from tael.evals.limits import measure_limits


def test_limits_are_of_this_cpu() -> None:
    limits = measure_limits(num_threads=2, read_bytes=1 << 20)
    assert limits.num_threads == 2
    assert 1e8 < limits.read_bytes_per_s < 1e13
    for rate in (limits.int8_ops_per_s, limits.bf16_flops_per_s):
        assert rate is None or 1e9 < rate < 1e15
