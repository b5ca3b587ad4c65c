"""Matrix products of llama.cpp's library, called through ctypes."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from ctypes import CDLL, Structure, c_bool, c_int, c_int64, c_size_t, c_void_p

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import environment

TYPES = {"Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}
"""enum ggml_type of ggml.h."""
F32 = 0

_NO_LOG = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)(lambda *_: None)
"""The library prints a line for each matrix that it repacks."""


def products(
    type_name: str,
    raw: NDArray[np.uint8],
    x: NDArray[np.float32],
    num_matrices: int,
    num_threads: int,
) -> list[Products]:
    """The products of ``x``, [num_tokens, columns], with copies of ``raw``, [rows, row_bytes]: with
    the plain kernels and, where the library has them, with those for repacked weights."""
    found = []
    for kernels, buffer_type in _buffer_types():
        candidate = Products(type_name, len(raw), x, num_matrices, buffer_type, num_threads)
        candidate.kernels = kernels
        if candidate.is_supported():
            candidate.set_weights(raw)
            found.append(candidate)
        else:
            candidate.close()
    return found


class Products:
    """A graph of products of the same activations with several matrices."""

    kernels = ""
    """"plain" or "repacked"."""

    def __init__(
        self,
        type_name: str,
        rows: int,
        x: NDArray[np.float32],
        num_matrices: int,
        buffer_type: int,
        num_threads: int,
    ) -> None:
        self._base, self._cpu = _libraries()
        num_tokens, columns = x.shape
        context, graph_context = (_context(self._base, num_matrices) for _ in range(2))
        self._weights = [
            self._base.ggml_new_tensor_2d(context, TYPES[type_name], columns, rows)
            for _ in range(num_matrices)
        ]
        weights_buffer = self._base.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        inputs = self._base.ggml_new_tensor_2d(graph_context, F32, columns, num_tokens)
        self._graph = self._base.ggml_new_graph(graph_context)
        for weight in self._weights:
            self._product = self._base.ggml_mul_mat(graph_context, weight, inputs)
            self._base.ggml_build_forward_expand(self._graph, self._product)
        plain = self._base.ggml_backend_cpu_buffer_type()
        graph_buffer = self._base.ggml_backend_alloc_ctx_tensors_from_buft(graph_context, plain)
        if not weights_buffer or not graph_buffer:
            raise MemoryError("ggml")
        self._base.ggml_backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
        self._owned = [(context, weights_buffer), (graph_context, graph_buffer)]
        self._backend = self._cpu.ggml_backend_cpu_init()
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, num_threads)

    def is_supported(self) -> bool:
        """Of this type and shape in this buffer. Before that is known, no weights may be set."""
        device = _device(self._base, self._cpu)
        return bool(self._base.ggml_backend_dev_supports_op(device, self._product))

    def set_weights(self, raw: NDArray[np.uint8]) -> None:
        for weight in self._weights:
            self._base.ggml_backend_tensor_set(weight, raw.ctypes.data, 0, raw.nbytes)

    def run(self, min_seconds: float) -> float:
        """Seconds of a pass: the mean over passes that take ``min_seconds``, after as long a
        warm-up."""
        self._seconds_of_a_pass(min_seconds)
        return self._seconds_of_a_pass(min_seconds)

    def _seconds_of_a_pass(self, min_seconds: float) -> float:
        seconds, passes = 0.0, 0
        start = time.perf_counter()
        while seconds < min_seconds:
            self._compute()
            passes += 1
            seconds = time.perf_counter() - start
        return seconds / passes

    def close(self) -> None:
        self._base.ggml_backend_free(self._backend)
        for context, buffer in self._owned:
            self._base.ggml_backend_buffer_free(buffer)
            self._base.ggml_free(context)

    def _compute(self) -> None:
        if self._base.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml_backend_graph_compute failed")


def _buffer_types() -> Iterator[tuple[str, int]]:
    """The plain buffer, and those that repack what is put into them."""
    base, cpu = _libraries()
    yield "plain", base.ggml_backend_cpu_buffer_type()
    name = b"ggml_backend_dev_get_extra_bufts"
    address = base.ggml_backend_reg_get_proc_address(cpu.ggml_backend_cpu_reg(), name)
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(_device(base, cpu))
    for handle in extra:
        if not handle:
            return
        yield "repacked", handle


def _device(base: CDLL, cpu: CDLL) -> int:
    handle: int = base.ggml_backend_reg_dev_get(cpu.ggml_backend_cpu_reg(), 0)
    return handle


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def _context(base: CDLL, num_tensors: int) -> int:
    """Holds descriptions of tensors and a graph, not their data."""
    handle: int = base.ggml_init(_InitParams((num_tensors + 8) * 1024 + (1 << 20), None, True))
    return handle


def _libraries() -> tuple[CDLL, CDLL]:
    """(libggml-base, libggml-cpu) with the signatures of what is called above."""
    folder = environment("llama-cpp") / "build" / "bin"
    base, cpu = CDLL(str(folder / "libggml-base.so")), CDLL(str(folder / "libggml-cpu.so"))
    p = c_void_p
    for library, name, result, *arguments in (
        (base, "ggml_log_set", None, p, p),
        (base, "ggml_init", p, _InitParams),
        (base, "ggml_free", None, p),
        (base, "ggml_new_tensor_2d", p, p, c_int, c_int64, c_int64),
        (base, "ggml_new_graph", p, p),
        (base, "ggml_mul_mat", p, p, p, p),
        (base, "ggml_build_forward_expand", None, p, p),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", p, p, p),
        (base, "ggml_backend_cpu_buffer_type", p),
        (base, "ggml_backend_tensor_set", None, p, p, c_size_t, c_size_t),
        (base, "ggml_backend_graph_compute", c_int, p, p),
        (base, "ggml_backend_buffer_free", None, p),
        (base, "ggml_backend_free", None, p),
        (base, "ggml_backend_dev_supports_op", c_bool, p, p),
        (base, "ggml_backend_reg_dev_get", p, p, c_size_t),
        (base, "ggml_backend_reg_get_proc_address", p, p, ctypes.c_char_p),
        (cpu, "ggml_backend_cpu_reg", p),
        (cpu, "ggml_backend_cpu_init", p),
        (cpu, "ggml_backend_cpu_set_n_threads", None, p, c_int),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    base.ggml_log_set(_NO_LOG, None)
    return base, cpu
