"""What benchmarks/server_load.py makes of what users saw."""

from __future__ import annotations

import pytest

from benchmarks.chats import OUTPUT_TOKENS, Sample, chat
from benchmarks.server_load import percentiles, ratios, summary
from tael.errors import TaelError


def test_only_what_comes_after_the_warm_up_counts() -> None:
    samples = [
        # It had two of its four pieces before, and each piece is two tokens.
        Sample(5, 200, pieces_s=[7, 9, 11, 13], end_s=14, num_output_tokens=8),
        Sample(1, 200, pieces_s=[2, 3], end_s=4, num_output_tokens=2),
        # The run ended first.
        Sample(12, 200, pieces_s=[15, 16, 18]),
        Sample(12),
        Sample(2, 503, "1", end_s=2.5),
        Sample(12, 503, "1", end_s=12.25),
        Sample(12, 503, end_s=12.5),
    ]
    assert summary(samples, 10, 20) == {
        "seconds": 10,
        "answers": 1,
        "errors": 0,
        "requests_per_s": 0.1,
        "output_tokens_per_s": 0.7,
        "first_token_s": {"p50": 3, "p99": 3},
        "inter_token_s": {"p50": 2, "p99": 2},
        "answer_s": {"p50": 9, "p99": 9},
        "refused": 2,
        "refused_without_retry_after": 1,
        "refused_s": {"p50": 0.25, "p99": 0.5},
    }


def test_errors_are_counted() -> None:
    whole = Sample(0, 200, pieces_s=[1, 2], end_s=3, num_output_tokens=2)
    cut = Sample(0, 200, pieces_s=[1], end_s=2, error="a stream that just ended")
    result = summary([whole, cut, Sample(0, 500, end_s=1), Sample(0, 0, error="x", end_s=1)], 0, 4)
    assert (result["answers"], result["errors"]) == (1, 3)
    assert result["first_errors"] == ["a stream that just ended", "status 500", "x"]
    nothing = summary([cut], 0, 4)
    assert nothing["answers"] == 0 and nothing["answer_s"] is None
    with pytest.raises(TaelError, match="no answer"):
        ratios(result, nothing)


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentiles(range(1, 1001)) == {"p50": 500, "p99": 990}
    assert percentiles([3.0]) == {"p50": 3.0, "p99": 3.0}


def test_ratios() -> None:
    names = ("first_token_s", "inter_token_s", "answer_s")
    fast = {"output_tokens_per_s": 10, **{name: {"p50": 1.0, "p99": 2.0} for name in names}}
    slow = {"output_tokens_per_s": 5, **{name: {"p50": 2.0, "p99": 8.0} for name in names}}
    assert ratios(fast, slow) == {
        "output_tokens_per_s": 2.0,
        **{f"{name} p50": 0.5 for name in names},
        **{f"{name} p99": 0.25 for name in names},
    }


def test_a_seed_names_a_request() -> None:
    assert chat("3/7") == chat("3/7") != chat("3/8")
    lengths = [len(str(chat(str(i))["messages"])) for i in range(200)]
    assert max(lengths) > 10 * min(lengths)
    tokens = {chat(str(i))["max_tokens"] for i in range(200)}
    assert min(tokens) >= OUTPUT_TOKENS[0] and max(tokens) <= OUTPUT_TOKENS[1]
