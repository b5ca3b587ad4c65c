"""What an answer must look like: ``response_format``, and ``tool_choice``, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tael.server.errors import ApiError, bad_request
from tael.server.openai_schema import (
    MAX_SCHEMA_CHARACTERS,
    NamedTool,
    Tool,
)
from tael.server.service import Service
from tael.server.tool_calls import BEGIN, END


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that a request offers, and whether one must be called."""

    tools: Sequence[Tool]
    choice: Literal["none", "auto", "required"] | NamedTool | None

    @property
    def is_active(self) -> bool:
        """Whether the model may call a tool."""
        return bool(self.tools) and self.choice != "none"

    @property
    def names(self) -> frozenset[str]:
        """Of the tools that the model may call."""
        return frozenset(t.function.name for t in self.tools) if self.is_active else frozenset()

    @property
    def is_required(self) -> bool:
        return self.choice == "required" or isinstance(self.choice, NamedTool)

    def check(self, service: Service) -> None:
        """Raises ApiError for what this model does not offer, and for contradictions."""
        names = [tool.function.name for tool in self.tools]
        if self.is_active and not service.engine.tokenizer.chat_template_has_tools:
            raise bad_request(
                "The chat template of this model has no tools.",
                "unsupported_parameter",
                param="tools",
            )
        if len(set(names)) < len(names):
            raise bad_request("Two tools have the same name.", param="tools")
        if self.is_required and not names:
            raise bad_request("tool_choice needs tools.", param="tool_choice")
        if isinstance(self.choice, NamedTool) and self.choice.function.name not in names:
            raise bad_request(
                f"tool_choice names {self.choice.function.name!r}, which is not in tools.",
                param="tool_choice",
            )

    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is given to show them to the model."""
        if not self.is_active:
            return {}
        return {"tools": [tool.model_dump(exclude_none=True) for tool in self.tools]}

    def grammar(self) -> str | None:
        """What the answer must match. Raises ApiError for a schema that is too large."""
        if isinstance(self.choice, NamedTool):
            name = self.choice.function.name
            return _calls([tool for tool in self.tools if tool.function.name == name])
        return _calls(self.tools) if self.choice == "required" else None


def grammar_of(
    tool_use: ToolUse,
    wanted: str | None,
    *,
    param: str,
    ignore_eos: bool,
    parallel_tool_calls: bool | None,
) -> str | None:
    """What an answer must match, if anything: the grammar ``wanted`` by the parameter ``param``, or
    that of a required tool. Raises ApiError for what cannot be combined."""
    if wanted is not None and tool_use.is_active:
        raise _not_with(param, "tools")
    if ignore_eos and (wanted is not None or tool_use.is_required):
        raise _not_with("ignore_eos", f"{param} or a required tool")
    if parallel_tool_calls is False and tool_use.is_active and not tool_use.is_required:
        raise _not_with("parallel_tool_calls", "tool_choice auto unless it is true")
    return tool_use.grammar() if wanted is None else wanted


def _not_with(param: str, other: str) -> ApiError:
    return bad_request(
        f"{param} cannot be combined with {other}.", "unsupported_parameter", param=param
    )


def json_grammar(schema: Mapping[str, Any], param: str) -> str:
    """JSON that matches a schema."""
    return json.dumps({"grammars": [{"json_schema": _compact(schema, param)}]})


def _calls(tools: Sequence[Tool]) -> str:
    """One call of one of the tools, in Lark."""
    rules = [f"start: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        schema = _compact(tool.function.parameters or {"type": "object"}, "tools")
        head = json.dumps(f'{BEGIN}\n{{"name": "{tool.function.name}", "arguments": ')
        tail = json.dumps(f"}}\n{END}")
        rules.append(f"call_{i}: {head} arguments_{i} {tail}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules) + "\n"


def _compact(schema: Mapping[str, Any], param: str) -> dict[str, Any]:
    """The schema without the freedom of white space, in which small models lose their way. Raises
    ApiError if it is too large."""
    num_characters = len(json.dumps(schema))
    if num_characters > MAX_SCHEMA_CHARACTERS:
        raise bad_request(
            f"A schema of {num_characters:,} characters is too large; the limit is "
            f"{MAX_SCHEMA_CHARACTERS:,}.",
            "invalid_schema",
            param=param,
        )
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": options}
