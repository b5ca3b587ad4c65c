"""What this machine can do at most: the lines that speeds are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from tael import _native

READ_BYTES = 256 << 20
"""Read in one pass: many times the last level of cache."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of ``num_threads`` threads together. None: the CPU has no such instruction."""

    num_threads: int
    read_bytes_per_s: float
    """Sequential reads of memory."""
    int8_ops_per_s: float | None
    """AVX-512 VNNI dot products on registers; a multiply-add is two operations."""
    bf16_flops_per_s: float | None
    """AVX-512 BF16 dot products on registers; a multiply-add is two operations."""


def measure_limits(num_threads: int, read_bytes: int = READ_BYTES) -> Limits:
    """Takes about half a second and ``read_bytes`` of memory."""
    return Limits(
        num_threads=num_threads,
        read_bytes_per_s=_native.read_bytes_per_s(num_threads, read_bytes),
        int8_ops_per_s=_native.int8_ops_per_s(num_threads),
        bf16_flops_per_s=_native.bf16_flops_per_s(num_threads),
    )
