"""vLLM in its own environment: MODEL.gguf FOLDER NUM_THREADS. FOLDER receives the model in bf16."""

from __future__ import annotations

import os
import sys
from pathlib import Path

MAX_MODEL_LEN = 17408
"""What the deepest case takes."""

KV_GIB = "4"


def work(model: Path, folder: Path, num_threads: int) -> None:
    if not folder.exists():
        dequantize(model, folder)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": KV_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from serve import serve
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
        enable_prefix_caching=True,
    )
    vllm = llm.llm_engine

    def add(prompts: list[list[int]], num_output_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            vllm.add_request(str(i), {"prompt_token_ids": prompt}, params)

    def step() -> tuple[set[int], bool]:
        outputs = vllm.step()
        return {int(output.request_id) for output in outputs}, vllm.has_unfinished_requests()

    serve(add, step)


def dequantize(model: Path, folder: Path) -> None:
    """Write a GGUF model as a directory of Hugging Face, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        model.parent,
        gguf_file=model.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    scratch = folder.with_suffix(".part")
    loaded.save_pretrained(scratch)
    scratch.rename(folder)


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
