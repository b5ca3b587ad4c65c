"""OpenVINO GenAI, which reads GGUF files of Llama and Qwen2 with Q4_0, Q4_1, Q8_0, Q4_K and Q6_K.

    python -m benchmarks.peers.openvino install

It converts the weights to its own 4-bit form on loading. Of the four models of the table it runs
SmolLM2 and Qwen2.5 1.5B; the others have Q5_0, and Gemma 3.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peers import WorkerEngine, create_environment

NAME = "OpenVINO"
VERSION = "openvino-genai 2026.4.1.0"
ENVIRONMENT = "openvino"


def install() -> None:
    create_environment(ENVIRONMENT, VERSION.replace(" ", "=="))


def engine(model: Path, num_threads: int) -> WorkerEngine:
    return WorkerEngine(ENVIRONMENT, "openvino_worker.py", str(model), str(num_threads))


if __name__ == "__main__" and sys.argv[1:] == ["install"]:
    install()
