"""When loading beats computing again."""

from __future__ import annotations

NEWEST = 0.5
"""Weight of a measurement against all earlier ones."""
FORGIVENESS = 1.1
"""For each request that does without loading, the disk is thought this much faster."""
PATIENCE = 4.0
"""A load is given up after this many times the time of computing again, and not before..."""
MIN_PATIENCE_S = 10.0
"""...this: so long takes a sleeping disk to wake. Nobody else waits for it."""


class LoadPolicy:
    """Running measurements of the disk and of prefill. Before the first ones, a guess that lets
    loading win: it measures the disk."""

    def __init__(self) -> None:
        self.bytes_per_s = 1e9
        self.tokens_per_s = 1e3
        self._has_loaded = False
        self._has_computed = False

    def pays(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether ``num_bytes`` are read sooner than ``num_tokens`` are computed."""
        return num_bytes / self.bytes_per_s < num_tokens / self.tokens_per_s

    def forgive(self) -> None:
        self.bytes_per_s *= FORGIVENESS

    def patience_s(self, num_tokens: int) -> float:
        """How long to wait for a load in place of ``num_tokens``."""
        return max(MIN_PATIENCE_S, PATIENCE * num_tokens / self.tokens_per_s)

    def observe_load(self, num_bytes: int, elapsed_s: float) -> None:
        rate = num_bytes / max(elapsed_s, 1e-6)
        self.bytes_per_s = _mean(self.bytes_per_s, rate) if self._has_loaded else rate
        self._has_loaded = True

    def observe_timeout(self, num_bytes: int, elapsed_s: float) -> None:
        """A load was given up after ``num_bytes``."""
        self.bytes_per_s = max(1.0, num_bytes / elapsed_s)

    def observe_prefill(self, num_tokens: int, elapsed_s: float) -> None:
        rate = num_tokens / max(elapsed_s, 1e-6)
        self.tokens_per_s = _mean(self.tokens_per_s, rate) if self._has_computed else rate
        self._has_computed = True


def _mean(earlier: float, newest: float) -> float:
    return (1 - NEWEST) * earlier + NEWEST * newest
