"""Chat requests as programmers send them, and what a client notes of each.

They are made from the functions of Python's standard library, and have from some 20 to some 1,100
prompt tokens; the same seed gives the same request.
"""

from __future__ import annotations

import heapq
import inspect
import json
import random
import shutil
import tarfile
import textwrap
import urllib.parse
import zipfile
from functools import cache
from typing import Any

import msgspec

SYSTEM = "You are a careful programmer. Answer briefly, with code where it helps."
QUESTIONS = (
    "How do I read a large file line by line?",
    "What is the difference between a list and a tuple?",
    "Write a function that removes duplicates from a list and keeps its order.",
    "How do I sort a dictionary by its values?",
)
TASKS = (
    "Explain what this function does.",
    "Write a docstring for this function.",
    "Write a unit test for this function.",
    "Find a bug in this function, or say that there is none.",
)
MODULES = (heapq, json, shutil, tarfile, textwrap, urllib.parse, zipfile)
MAX_SOURCE_CHARACTERS = 3000
OUTPUT_TOKENS = (64, 256)


class Sample(msgspec.Struct):
    """What a user saw of a request; times are in seconds since the start of the run."""

    start_s: float
    status: int = 0
    retry_after: str | None = None
    pieces_s: list[float] = []
    """When each piece of the answer came."""
    end_s: float | None = None
    """None if the run ended first."""
    num_output_tokens: int = 0
    """As the server said at the end."""
    error: str | None = None


def chat(seed: str) -> dict[str, Any]:
    """The body of a streamed request. It is answered to its last token, so that what is
    computed does not depend on who answers."""
    rng = random.Random(seed)
    messages = [{"role": "system", "content": SYSTEM}]
    if rng.random() < 0.25:  # in the middle of a conversation
        messages.append({"role": "user", "content": rng.choice(QUESTIONS)})
        messages.append({"role": "assistant", "content": f"Like this:\n\n{rng.choice(sources())}"})
    if rng.random() < 0.25:
        content = rng.choice(QUESTIONS)
    else:
        content = f"{rng.choice(TASKS)}\n\n{rng.choice(sources())}"
    messages.append({"role": "user", "content": content})
    return {
        "model": "m",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "seed": rng.randrange(1 << 31),
        "max_tokens": rng.randint(*OUTPUT_TOKENS),
        "ignore_eos": True,
    }


@cache
def sources() -> list[str]:
    """Functions of up to MAX_SOURCE_CHARACTERS."""
    functions = [
        inspect.getsource(function)
        for module in MODULES
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    ]
    return [source for source in functions if len(source) <= MAX_SOURCE_CHARACTERS]
