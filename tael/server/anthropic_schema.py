"""What callers of ``/v1/messages`` may send."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tael.economics.rate_card import ServiceTier
from tael.server.openai_schema import FunctionName, JsonObject, MaxTokens, Name, Stop, Strict


class CacheControl(Strict):
    """A hint: prefixes are cached without being asked."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class DirectCaller(Strict):
    """The model itself, not code of its own."""

    type: Literal["direct"]


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Name
    name: FunctionName
    input: JsonObject
    caller: DirectCaller | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | list[TextBlock] = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Message(Strict):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class InputTool(Strict):
    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: JsonObject
    cache_control: CacheControl | None = None


class Choice(Strict):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: Literal[False] | None = None


class NamedChoice(Strict):
    type: Literal["tool"]
    name: FunctionName
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(Strict):
    model: Name
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[InputTool], Field(max_length=128)] | None = None
    tool_choice: Annotated[Choice | NamedChoice, Field(discriminator="type")] | None = None


class RequestMetadata(Strict):
    user_id: Name | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: MaxTokens
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def tier(self) -> ServiceTier:
        """The one to serve this in: the dialect has no other."""
        return "default"
