"""A rate over the last seconds, with a clock that the test turns."""

from __future__ import annotations

from tael.server.meter import WINDOW_S, Meter


def test_only_the_last_seconds_count() -> None:
    now_s = 100.0
    meter = Meter(lambda: now_s)
    assert meter.per_s == 0
    meter.add(10)
    now_s += WINDOW_S / 2
    meter.add(5)
    assert meter.per_s == 15 / WINDOW_S
    now_s += WINDOW_S / 2
    assert meter.per_s == 5 / WINDOW_S
    now_s += WINDOW_S
    assert meter.per_s == 0


def test_what_nobody_asks_for_is_forgotten_too() -> None:
    now_s = 0.0
    meter = Meter(lambda: now_s)
    for _ in range(10_000):
        now_s += WINDOW_S / 10
        meter.add(1)
    assert len(meter._counts) <= 10
