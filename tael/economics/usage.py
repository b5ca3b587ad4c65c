"""The one usage record in the dialects of the APIs.

They count the same tokens differently. OpenAI's prompt tokens include what the cache gave and
took, and the details say how much of them that was. Anthropic's ``input_tokens`` exclude both, so
its three counts add up to the prompt. DeepSeek splits the prompt into hits and misses.
"""

from __future__ import annotations

from typing import Any

from tael.request import Usage


def openai_chat(usage: Usage) -> dict[str, Any]:
    """``usage`` of /v1/chat/completions and /v1/completions.

    Drafted tokens are not ``accepted_prediction_tokens``: those are predictions of the caller,
    who pays for the rejected ones.
    """
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": _openai_details(usage),
    }


def openai_responses(usage: Usage) -> dict[str, Any]:
    """``usage`` of /v1/responses. Its clients require the count of reasoning tokens; the engine
    does not tell them from other output."""
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": _openai_details(usage),
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }


def anthropic(usage: Usage) -> dict[str, Any]:
    """``usage`` of /v1/messages."""
    return {
        "input_tokens": usage.num_fresh_tokens,
        "cache_creation_input_tokens": usage.num_cache_write_tokens,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }


def deepseek(usage: Usage) -> dict[str, Any]:
    """``usage`` of DeepSeek's chat completions: what was written to the cache is a miss."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_cache_hit_tokens": usage.num_cached_tokens,
        "prompt_cache_miss_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
    }


def _openai_details(usage: Usage) -> dict[str, int]:
    return {
        "cached_tokens": usage.num_cached_tokens,
        "cache_write_tokens": usage.num_cache_write_tokens,
    }
