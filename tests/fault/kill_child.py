"""A process to be killed: ``python kill_child.py MODEL FOLDER CHECK STORE``.

Answers ``NUM_CHECKED`` of the prompts from number CHECK on and prints their tokens and the tier's
counters as JSON; then prints "storing" and answers the prompts from number STORE on, for ever, so
that their blocks are stored. With "-" for FOLDER it answers all prompts without a disk and ends.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import count

import numpy as np

from tael import LLM, SamplingParams

NUM_PROMPTS = 64
NUM_CHECKED = 8
BATCH = 4
CACHE_BYTES = 200 * 12288
"""200 of the 448 blocks of all prompts: some are evicted while others are stored."""
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = np.random.default_rng(7).integers(0, 200, (NUM_PROMPTS, 230)).tolist()


def some(start: int, number: int) -> list[list[int]]:
    return [PROMPTS[i % NUM_PROMPTS] for i in range(start, start + number)]


def main() -> None:
    path, folder, check, store = sys.argv[1:]
    if folder == "-":
        with LLM(path, memory=400 << 20, num_threads=1) as llm:
            outputs = llm.generate(PROMPTS, PARAMS)
        print(json.dumps([output.outputs[0].token_ids for output in outputs]))
        return
    llm = LLM(path, kv_cache_dir=folder, kv_cache_size=CACHE_BYTES, memory=400 << 20, num_threads=1)
    outputs = llm.generate(some(int(check), NUM_CHECKED), PARAMS)
    assert llm.engine.tier is not None
    report = {
        "token_ids": [output.outputs[0].token_ids for output in outputs],
        "num_restored_tokens": sum(output.usage.num_restored_tokens for output in outputs),
        "failure": llm.engine.tier.failure,
        **asdict(llm.engine.tier.counters),
    }
    print(json.dumps(report), "storing", sep="\n", flush=True)
    for i in count(int(store), BATCH):
        llm.generate(some(i, BATCH), PARAMS)


if __name__ == "__main__":
    main()
