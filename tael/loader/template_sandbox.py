"""Where a chat template runs: Jinja's sandbox, with bounds on work and memory.

Jinja's sandbox keeps a template away from Python's internals. It does not keep it from looping
for hours or from building gigabytes, so this one also

- offers only the filters, globals and string methods that chat templates use,
- counts the iterations of loops and the characters of every value made, and stops at a limit,
- checks the size of a result beforehand where it can be much larger than its operands.
"""

from __future__ import annotations

import json
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 1 << 24
"""Of one value, and of the whole output. The longest contexts are about 4 million characters."""

MAX_WORK = 1_000_000
"""Loop iterations, calls and operations of one rendering; 512 characters count as one more."""

MAX_CPU_S = 5.0

# fmt: off
_FILTERS = [
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "round", "safe", "select", "selectattr", "sort", "title", "trim",
    "unique", "upper",
]
_STRING_METHODS = frozenset([
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha",
    "isdigit", "islower", "isspace", "isupper", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "rfind", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "title", "upper",
])
# fmt: on


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """One rendering: the limits are counted per instance, so each rendering makes its own."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # The options of transformers.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._finalize,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.filters = {name: FILTERS[name] for name in _FILTERS}
        self.filters |= {
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "string": self._text,
            "tojson": self._to_json,
            "_concat": self._join,
            "_each": self._each,
            "_made": self._made,
        }
        self._work_left = MAX_WORK
        self._deadline = time.thread_time() + MAX_CPU_S

    def spend(self, num_characters: int = 0) -> None:
        """Count one operation that made ``num_characters``."""
        self._work_left -= 1 + (num_characters >> 9)
        if self._work_left < 0 or time.thread_time() > self._deadline:
            raise SecurityError("it takes too long")

    def reserve(self, num_characters: int) -> None:
        """Refuse a value of more than MAX_CHARACTERS before it is made."""
        if num_characters > MAX_CHARACTERS:
            raise SecurityError(f"it makes a value of more than {MAX_CHARACTERS} characters")
        self.spend(num_characters)

    # What Jinja calls for every operation of that kind.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        return self._made(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja asks this about every attribute. Besides ``format``, two more methods of strings
        need care. Plain functions are returned, since a template can read the fields of a
        ``functools.partial``."""
        owner, name = getattr(value, "__self__", None), getattr(value, "__name__", None)
        if isinstance(owner, str) and name == "replace":
            return lambda *args: self._replace(owner, *args)
        if isinstance(owner, str) and name == "join":
            return lambda values: self._join(values, owner)
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None
        return lambda *args, **kwargs: self._format(wrapper, str(owner), args, kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator}")
        if operator == "*":
            self.reserve(_product_size(left, right))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.reserve(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def concat(self, pieces: Iterable[str]) -> str:
        """Of set blocks and macros."""
        return self._join(pieces)

    def getitem(self, obj: Any, argument: Any) -> Any:
        value = super().getitem(obj, argument)
        if isinstance(argument, slice) and hasattr(value, "__len__"):
            self.reserve(len(value))
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return template

    # Filters.

    def _each(self, values: Any) -> Iterator[Any]:
        """Around what a ``for`` loop iterates over."""
        for value in values:
            self.spend()
            yield value

    def _made(self, value: Any) -> Any:
        """Around an expression that makes a value."""
        self.reserve(self._size(value))
        return value

    def _size(self, value: Any) -> int:
        """Characters of the text of ``value``, about. Stops counting above MAX_CHARACTERS, so
        that a list that holds another list many times costs no more."""
        size, rest = 0, [value]
        while rest and size <= MAX_CHARACTERS:
            value = rest.pop()
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, Mapping):
                size += 8 * len(value)
                rest += value
                rest += value.values()
            elif isinstance(value, (list, tuple)):
                size += 8 * len(value)
                rest += value
            else:
                size += 8
        return size

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        self._made(value)
        return str(value)

    def _finalize(self, value: Any) -> Any:
        return value if isinstance(value, (str, Undefined)) else self._text(value)

    def _join(self, values: Any, separator: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        separator = self._text(separator)
        texts: list[str] = []
        size = 0
        for value in values:
            texts.append(self._text(value))
            size += len(texts[-1]) + len(separator)
            if size > MAX_CHARACTERS:
                break
        self.reserve(size)
        return str(separator.join(texts))

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text(text), self._text(old), self._text(new)
        self.reserve(len(text) + text.count(old) * len(new))
        return str(text.replace(old, new, -1 if count is None else count))

    def _format(
        self,
        format: Callable[..., str],
        text: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> str:
        fields = list(string.Formatter().parse(text))
        if any(spec for _, _, spec, _ in fields):
            raise SecurityError("it gives widths to format()")
        self.reserve(len(text) + len(fields) * self._size([*args, *kwargs.values()]))
        return format(*args, **kwargs)

    def _indent(
        self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        text = self._text(text)
        num_columns = len(width) if isinstance(width, str) else width
        self.reserve(len(text) + (text.count("\n") + 1) * num_columns)
        return str(FILTERS["indent"](text, width, first, blank))

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and indent > 16:
            raise SecurityError(f"it indents JSON by {indent}")
        self._made(value)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self._join(encoder.iterencode(value))


class _Metering(NodeTransformer):
    """Puts the filters that count around the parts of a template that loop or make values and
    for which Jinja calls no method of the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not available", node.lineno)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made") if node.ctx == "load" else node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationBlock(Extension):
    """``{% generation %}`` marks an assistant's text for training; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _product_size(left: Any, right: Any) -> int:
    for factor, times in ((left, right), (right, left)):
        if hasattr(factor, "__len__") and isinstance(times, int):
            return len(factor) * times
    # A few dozen squarings of an integer fill any memory.
    return MAX_CHARACTERS + 1 if max(abs(left), abs(right)) > 1 << 64 else 0
