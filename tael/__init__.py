"""Tael: a long-context LLM inference engine for scarce hardware.

>>> from tael import LLM, SamplingParams
>>> with LLM("smollm2:135m") as llm:
...     print(llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tael.async_llm import AsyncLLM
    from tael.errors import TaelError
    from tael.llm import LLM
    from tael.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "TaelError", "__version__"]

_MODULES = {
    "AsyncLLM": "tael.async_llm",
    "LLM": "tael.llm",
    "SamplingParams": "tael.request",
    "TaelError": "tael.errors",
}


def __getattr__(name: str) -> Any:
    # On first use, so that "tael --help" does not wait for numpy.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'tael' has no attribute {name!r}")
