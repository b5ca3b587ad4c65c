"""What callers of ``/v1/responses`` may send: text and calls of functions, nothing stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tael.server.openai_schema import (
    FunctionName,
    JsonObject,
    JsonObjectFormat,
    MaxTokens,
    Name,
    Sampling,
    Strict,
    TextFormat,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """Also an output item that is sent back, which has an id and a status."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[InputText | OutputText, Field(discriminator="type")]]
    id: Name | None = None
    status: ItemStatus | None = None
    phase: Name | None = None


class FunctionCallItem(Strict):
    """A call that the model made, sent back."""

    type: Literal["function_call"]
    call_id: Name
    name: FunctionName
    arguments: str
    """JSON."""
    id: Name | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | list[InputText]
    id: Name | None = None
    status: ItemStatus | None = None


def _item_type(item: Any) -> str | None:
    """Messages may leave it out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _item_type,
        custom_error_type="unknown_item",
        custom_error_message="items are of type message, function_call or function_call_output",
    ),
]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    name: FunctionName
    schema_: Annotated[JsonObject, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class Text(Strict):
    format: (
        Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
        | None
    ) = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class NamedFunctionTool(Strict):
    type: Literal["function"]
    name: FunctionName


class ResponsesRequest(Sampling):
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    text: Text | None = None
    store: bool | None = None
    """Nothing is stored, whatever is asked for: the client sends the conversation again."""
    background: Literal[False] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
