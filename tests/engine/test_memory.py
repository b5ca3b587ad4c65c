"""The process stays within its budget, measured by the operating system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = """
import json, sys
from tael import LLM, SamplingParams
from tael.memory.process import peak_rss_bytes

path, memory, num_prompts, num_tokens = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM(path, memory=memory)
text = open(__import__("argparse").__file__).read()
ids = llm.encode(text[: 5 * num_tokens])[:num_tokens]
assert len(ids) == num_tokens
params = SamplingParams(  # what takes the most memory to sample
    temperature=2.0, top_p=0.99, repetition_penalty=1.1, logprobs=20,
    seed=1, max_tokens=8, ignore_eos=True,
)
prompts = [ids[i:] for i in range(num_prompts)]
outputs = llm.generate(prompts, params)
manager = llm.engine.manager
print(json.dumps({
    "peak": peak_rss_bytes(),
    "budget": llm.engine.memory_bytes,
    "answers": [len(o.outputs[0].token_ids) for o in outputs],
    "kv_used": sum(
        (pool.num_cached + pool.num_referenced) / (
            pool.num_cached + pool.num_referenced + pool.num_free) for pool in manager.pools
    ) / len(manager.pools),
}))
"""
MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "memory", "num_prompts", "num_tokens"),
    [
        pytest.param("smollm2:135m", 280 * MIB, 3, 2500, id="one long context"),
        pytest.param("smollm2:135m", 400 * MIB, 40, 250, id="many requests"),
        pytest.param("gemma3:270m", 560 * MIB, 2, 1000, id="sliding windows"),
    ],
)
def test_peak_memory(
    name: str,
    memory: int,
    num_prompts: int,
    num_tokens: int,
    model_path: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """From a cold start, repacking included, to a pool that is well used."""
    command = [sys.executable, "-c", RUN, model_path(name)]
    run = subprocess.run(
        [*map(str, command), str(memory), str(num_prompts), str(num_tokens)],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    print(result)
    assert result["budget"] == memory
    assert result["answers"] == [8] * num_prompts
    assert result["kv_used"] > 0.5
    assert result["peak"] <= memory
