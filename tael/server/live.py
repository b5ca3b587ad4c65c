"""The figures beside the chat, as JSON.

Of the server they are totals that tell nothing of what anybody asked. What depends on prompts, and
what was paid, is the caller's own: a prefix-hit rate over all tenants would tell one of them
whether the prompts of another repeat themselves.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tael.economics.keys import Key
from tael.economics.rate_card import NO_CURRENCY
from tael.server.service import Service


def live_view(service: Service, key: Key) -> dict[str, Any]:
    """What ``key`` may see. Without an engine no sequence runs and there are no tiers."""
    status = service.engine.status
    usage = service.usage_of_key[key.key_id]
    return {
        "model": service.model,
        "ready": service.is_ready,
        "requests": {
            "running": status.num_running if status else 0,
            "waiting": service.admission.num_waiting + (status.num_waiting if status else 0),
        },
        "output_tokens_per_s": service.output_tokens.per_s,
        "tiers": msgspec.to_builtins(status.tiers if status else ()),
        "key": {
            "prompt_tokens": usage.num_prompt_tokens,
            "cached_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_output_tokens,
            "cost": _cost(service, key),
        },
    }


def _cost(service: Service, key: Key) -> dict[str, Any] | None:
    """None if nothing has a price."""
    if service.ledger is None:
        return None
    currency, amount_nano = service.ledger.spent(key.key_id)
    return None if currency == NO_CURRENCY else {"currency": currency, "nano": amount_nano}
