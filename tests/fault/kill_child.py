"""A process to be killed: ``python kill_child.py MODEL FOLDER SEED``.

Answers the known prompts and prints their tokens, restored blocks and what was found damaged as
JSON; then prints "storing" and stores the blocks of other prompts, never the same, for ever.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import count

import numpy as np

from tael import LLM, SamplingParams

CACHE_BYTES = 200 * 12288
"""200 blocks: so few enough that blocks are evicted while others are stored."""
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def known_prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 200, n).tolist() for n in (100, 150, 200, 230)]


def main() -> None:
    path, folder, seed = sys.argv[1:]
    llm = LLM(path, kv_cache_dir=folder, kv_cache_size=CACHE_BYTES, memory=400 << 20, num_threads=1)
    outputs = llm.generate(known_prompts(), PARAMS)
    assert llm.engine.tier is not None
    report = {
        "token_ids": [output.outputs[0].token_ids for output in outputs],
        "num_restored_tokens": sum(output.usage.num_restored_tokens for output in outputs),
        "failure": llm.engine.tier.failure,
        **asdict(llm.engine.tier.counters),
    }
    print(json.dumps(report), "storing", sep="\n", flush=True)
    if seed == "once":
        llm.close()
        return
    for i in count():
        rng = np.random.default_rng([int(seed), i])
        llm.generate([rng.integers(0, 200, 230).tolist() for _ in range(4)], PARAMS)


if __name__ == "__main__":
    main()
