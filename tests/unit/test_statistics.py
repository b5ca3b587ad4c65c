"""The line after an answer."""

from __future__ import annotations

from tael.cli.common import statistics
from tael.request import FinishReason, Usage


def test_drafts_are_told_of_if_there_were_any() -> None:
    assert "drafts" not in statistics(Usage(num_output_tokens=9), FinishReason.STOP)
    usage = Usage(num_output_tokens=1500, num_draft_tokens=1300, num_accepted_tokens=1000)
    line = statistics(usage, FinishReason.STOP)
    assert "1,500 tokens at 0.0/s, 1,000 of 1,300 drafts accepted (3.0 tokens a step), KV" in line
