"""Schemas that callers send leave nothing behind."""

from __future__ import annotations

import json
from queue import SimpleQueue

from tael import LLM
from tael.engine.grammar import GrammarCompiler, TokenMask
from tael.errors import TaelError
from tael.memory.process import release_freed_memory, rss_bytes

MAX_GROWTH_BYTES = 8 << 20
"""Ten thousand schemas that were kept would take ten times that."""


def test_memory_is_flat(llm: LLM) -> None:
    compiler = GrammarCompiler(llm.engine.tokenizer, llm.engine.spec.vocab_size)
    done: SimpleQueue[TokenMask | TaelError] = SimpleQueue()

    def compile_range(begin: int, end: int) -> None:
        for i in range(begin, end):
            schema = {"enum": [f"{i}-{j}" for j in range(20)]}
            grammar = json.dumps({"grammars": [{"json_schema": schema}]})
            compiler.compile(grammar, done.put)
            assert isinstance(done.get(timeout=60), TokenMask)
        release_freed_memory()

    compile_range(0, 2000)
    before = rss_bytes()
    compile_range(2000, 10_000)
    assert rss_bytes() - before < MAX_GROWTH_BYTES
