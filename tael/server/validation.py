"""From what pydantic found wrong with a request to the one error that its sender is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tael.server.errors import ApiError, bad_request

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
}

_TAGS = frozenset(
    {"str", "system", "developer", "user", "assistant", "tool", "text", "json_object"}
    | {"input_text", "output_text", "tool_use", "tool_result"}
    | {"message", "function_call", "function_call_output"}
)
"""In places of errors, the names of alternatives, which are not those of parameters."""


def first_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error to tell. Of the alternatives of a union each has its own; those of the wrong type
    were not meant, and of the others the one that got furthest tells most."""
    error = max(errors, key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    kind = error["type"]
    if kind == "json_invalid":
        return bad_request("The body is not valid JSON.", "invalid_json")
    param = _name(error["loc"])
    if kind == "missing":
        message = f"Missing required parameter: '{param}'." if param else "The body is missing."
    elif kind == "extra_forbidden":
        message = f"Unsupported parameter: '{param}'. It is refused so that it is not ignored."
    else:
        message = f"Invalid '{param}': {error['msg']}." if param else f"{error['msg']}."
    code = "invalid_type" if kind.endswith("_type") else _CODES.get(kind, "invalid_value")
    return bad_request(message, code, param=param)


def _name(place: Sequence[int | str]) -> str | None:
    """A parameter as OpenAI writes it: ``messages[0].content``."""
    name = ""
    for i, part in enumerate(place):
        if isinstance(part, int):
            name += f"[{part}]"
        elif part == "body" and i == 0:
            continue
        elif i == len(place) - 1 or (
            part.isidentifier() and part not in _TAGS and part != place[i + 1]
        ):
            name += f".{part}"
    return name.lstrip(".")[:200] or None
