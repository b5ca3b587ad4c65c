"""Typed, bounded reads of a model's configuration.

A model file comes from a stranger: every value is checked where it is read, and a bad one ends
in a ``TaelError`` that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tael.errors import TaelError

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face name -> ``Dense.activation``."""


class ModelConfig:
    """The keys of a ``config.json``, or of GGUF metadata under the same names.

    A key that is absent or null takes the default of the call; without a default it is an error.
    """

    def __init__(self, values: Mapping[str, Any], file_name: str) -> None:
        self.values = values
        self.file_name = file_name
        """Named in error messages."""

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**24
    ) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._bad(name, "a whole number")
        if not minimum <= value <= maximum:
            raise self._bad(name, f"between {minimum} and {maximum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number that float32 can hold."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._bad(name, "a number")
        if not 1e-30 <= value <= 1e30:
            raise self._bad(name, "above 0 and finite")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._bad(name, "a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._bad(name, "true or false")
        return value

    def section(self, name: str) -> Mapping[str, Any]:
        """A nested object; absent: empty."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise self._bad(name, "an object")
        return value

    def is_set(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, *names: str) -> None:
        """These change the computation in a way that the family does not implement."""
        for name in names:
            if self.values.get(name):
                raise TaelError(
                    f"{self.file_name} sets {name}, which Tael does not support for this model "
                    "family; use another model."
                )

    def heads(self, head_dim: int | None = None) -> tuple[int, int, int]:
        """(num_heads, num_kv_heads, head_dim), consistent. ``head_dim`` is the default; None:
        the hidden size shared out over the heads."""
        num_heads = self.integer("num_attention_heads", maximum=2**12)
        num_kv_heads = self.integer("num_key_value_heads", num_heads, maximum=2**12)
        if head_dim is None and not self.is_set("head_dim"):
            head_dim, rest = divmod(self.integer("hidden_size"), num_heads)
            if rest:
                raise self._bad("num_attention_heads", "a divisor of hidden_size")
        head_dim = self.integer("head_dim", head_dim, maximum=2**12)
        if num_heads % num_kv_heads:
            raise self._bad("num_key_value_heads", f"a divisor of {num_heads} attention heads")
        if self.integer("v_head_dim", head_dim) != head_dim:
            self.refuse("v_head_dim")
        if head_dim % 2:
            raise TaelError(
                f"{self.file_name} gives heads of {head_dim} channels; the rotary "
                "embedding needs an even number. The file may be damaged."
            )
        return num_heads, num_kv_heads, head_dim

    def num_layers(self) -> int:
        return self.integer("num_hidden_layers", maximum=2**12)

    def activation(self, name: str, default: str) -> str:
        value = self.text(name, default)
        if value not in ACTIVATIONS:
            raise self._bad(name, " or ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def windows(self, window: int | None, is_sliding: Sequence[bool]) -> tuple[int | None, ...]:
        """The window of each layer. ``layer_types`` says which layers slide; without it
        ``is_sliding`` does."""
        kinds = {"sliding_attention": True, "full_attention": False}
        types = self._get("layer_types", None)
        if types is not None:
            if not isinstance(types, list) or not all(t in list(kinds) for t in types):
                raise self._bad("layer_types", f"a list of {' or '.join(kinds)}")
            if len(types) != len(is_sliding):
                raise self._bad("layer_types", f"of length {len(is_sliding)}")
            is_sliding = [kinds[t] for t in types]
        if window is None and any(is_sliding):
            raise self._bad("sliding_window", "set, as some layers slide")
        return tuple(window if sliding else None for sliding in is_sliding)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _bad(self, name: str, expected: str) -> TaelError:
        if not self.is_set(name):
            return TaelError(
                f"{self.file_name} has no {name}; it may be damaged or of a kind "
                "that Tael does not know."
            )
        value = repr(self.values[name])
        shown = value if len(value) <= 60 else value[:60] + "..."
        return TaelError(
            f"{self.file_name} says {name} is {shown}; it must be {expected}. "
            "The file may be damaged."
        )
