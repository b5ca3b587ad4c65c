"""OpenVINO GenAI in its own environment: MODEL.gguf NUM_THREADS."""

from __future__ import annotations

import sys


def work(model: str, num_threads: int) -> None:
    import numpy as np
    import openvino_genai
    from openvino import Tensor
    from serve import serve

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 4  # GiB
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = 32
    properties = {"INFERENCE_NUM_THREADS": num_threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
    handles = {}

    def add(prompts: list[list[int]], num_output_tokens: int) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=num_output_tokens, ignore_eos=True, do_sample=False
        )
        for i, prompt in enumerate(prompts):
            handles[i] = pipeline.add_request(i, Tensor(np.array([prompt])), config)

    def step() -> tuple[set[int], bool]:
        pipeline.step()
        produced = {i for i, handle in handles.items() if handle.can_read() and handle.read()}
        return produced, pipeline.has_non_finished_requests()

    serve(add, step)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
