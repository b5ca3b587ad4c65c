"""From what pydantic found wrong with a request to the one error that its sender is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tael.server.errors import ApiError, bad_request

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "json_invalid": "invalid_json",
    "string_type": "invalid_type",
    "int_type": "invalid_type",
    "float_type": "invalid_type",
    "bool_type": "invalid_type",
    "list_type": "invalid_type",
    "dict_type": "invalid_type",
}


def first_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of the alternatives of a union each has its errors; the one that got furthest tells most."""
    error = max(errors, key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
    path = [part for part in error["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    param = param.lstrip(".")[:200]
    kind = error["type"]
    if kind == "json_invalid":
        return bad_request("The body is not valid JSON.", "invalid_json")
    if kind == "missing":
        message = f"Missing required parameter: '{param}'." if param else "The body is missing."
    elif kind == "extra_forbidden":
        message = f"Unsupported parameter: '{param}'. It is refused so that it is not ignored."
    else:
        message = f"Invalid '{param}': {error['msg']}." if param else f"{error['msg']}."
    return bad_request(message, _CODES.get(kind, "invalid_value"), param=param or None)
