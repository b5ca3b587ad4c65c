"""Errors as clients of the OpenAI and Anthropic APIs expect them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """What is wrong with a request, or with the server, in the words of the OpenAI API.

    ``code`` is a string that programs can tell errors apart by; ``param`` names the parameter that
    is at fault. ``retry_after_s`` tells the client when to come back.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            # Whole seconds are all that the header allows; the clients prefer the milliseconds.
            self.headers["retry-after"] = str(max(1, round(retry_after_s + 0.5)))
            self.headers["retry-after-ms"] = str(max(1, round(1000 * retry_after_s)))

    def body(self, path: str) -> dict[str, Any]:
        """In the dialect of a path."""
        return self.anthropic() if path.startswith("/v1/messages") else self.openai()

    def openai(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _OPENAI_TYPES.get(self.status, _default(self.status)),
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(
            self.status, "api_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": self.message}}


_OPENAI_TYPES = {429: "rate_limit_error", 503: "overloaded_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _default(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def bad_request(message: str, code: str = "invalid_value", *, param: str | None = None) -> ApiError:
    return ApiError(400, message, code, param=param)


def engine_down() -> ApiError:
    """For requests that lost their engine, and those that find none."""
    return ApiError(
        503,
        "The engine stopped and is being started again; please retry.",
        "engine_restarting",
        retry_after_s=2.0,
    )
