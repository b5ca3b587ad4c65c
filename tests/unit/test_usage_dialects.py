"""Every dialect counts the same tokens, each as its clients expect."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tael.economics.usage import anthropic, deepseek, openai_chat, openai_responses
from tael.request import Usage

counts = st.integers(0, 10**7)
usages = st.builds(
    lambda fresh, read, write, output: Usage(
        num_prompt_tokens=fresh + read + write,
        num_cached_tokens=read,
        num_cache_write_tokens=write,
        num_output_tokens=output,
    ),
    counts,
    counts,
    counts,
    counts,
)


def test_fields() -> None:
    usage = Usage(1000, 600, 300, 50, num_draft_tokens=9, num_accepted_tokens=5)
    details = {"cached_tokens": 600, "cache_write_tokens": 300}
    assert openai_chat(usage) == {
        "prompt_tokens": 1000,
        "completion_tokens": 50,
        "total_tokens": 1050,
        "prompt_tokens_details": details,
    }
    assert openai_responses(usage) == {
        "input_tokens": 1000,
        "input_tokens_details": details,
        "output_tokens": 50,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 1050,
    }
    assert anthropic(usage) == {
        "input_tokens": 100,
        "cache_creation_input_tokens": 300,
        "cache_read_input_tokens": 600,
        "output_tokens": 50,
    }
    assert deepseek(usage) == {
        "prompt_tokens": 1000,
        "completion_tokens": 50,
        "total_tokens": 1050,
        "prompt_cache_hit_tokens": 600,
        "prompt_cache_miss_tokens": 400,
    }


@given(usages)
def test_what_a_client_reads_adds_up_to_the_prompt(usage: Usage) -> None:
    """Read as the vendors' own documents say, all dialects give back the same classes."""
    classes = (usage.num_fresh_tokens, usage.num_cached_tokens, usage.num_cache_write_tokens)
    assert sum(classes) == usage.num_prompt_tokens
    for total, details in (
        ("prompt_tokens", openai_chat(usage)["prompt_tokens_details"]),
        ("input_tokens", openai_responses(usage)["input_tokens_details"]),
    ):
        rendered = openai_chat(usage) | openai_responses(usage)
        read, write = details["cached_tokens"], details["cache_write_tokens"]
        assert (rendered[total] - read - write, read, write) == classes
    rendered = anthropic(usage)
    assert classes == (
        rendered["input_tokens"],
        rendered["cache_read_input_tokens"],
        rendered["cache_creation_input_tokens"],
    )
    rendered = deepseek(usage)
    hit, miss = rendered["prompt_cache_hit_tokens"], rendered["prompt_cache_miss_tokens"]
    assert hit + miss == rendered["prompt_tokens"] and hit == usage.num_cached_tokens
