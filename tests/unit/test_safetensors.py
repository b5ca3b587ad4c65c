"""Model directories written by the safetensors package read back as they were written; damaged
ones end in TaelError."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.loader.safetensors import MAX_JSON_BYTES, SafetensorsCheckpoint
from tael.quant.dequantize import dequantize
from tael.quant.formats import FORMATS

CONFIG = {"model_type": "llama", "hidden_size": 8}


def write_config(directory: Path) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def write_model(directory: Path) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {
        "embed": rng.standard_normal((6, 8), np.float32),
        "norm": rng.standard_normal(8).astype(np.float16),
        "experts": rng.standard_normal((2, 3, 4), np.float32),
        "scalar": np.array(3.0, np.float32),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_single_file(tmp_path: Path) -> None:
    tensors = write_model(write_config(tmp_path))
    checkpoint: Checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.format == "hf"
    assert checkpoint.metadata == CONFIG
    assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, values in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == (values.shape or (1,))
        assert info.type == {"float32": "F32", "float16": "F16"}[str(values.dtype)]
        rows = values.reshape(-1, info.shape[-1])
        raw = checkpoint.read_rows(name, 0, len(rows))
        assert np.array_equal(dequantize(info.type, raw, info.shape[-1]), rows)
    assert np.array_equal(checkpoint.read_rows("embed", 2, 3).view("<f4"), tensors["embed"][2:5])
    with pytest.raises(IndexError):
        checkpoint.read_rows("embed", 4, 3)


def write_file(directory: Path, header: Any, data: bytes = bytes(32)) -> Path:
    """A model whose header is given as JSON."""
    text = json.dumps(header).encode()
    path = write_config(directory) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[Any], *data_offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


def test_bfloat16(tmp_path: Path) -> None:
    values = np.array([[1.0, -2.5], [0.125, 256.0]], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    path = write_file(tmp_path, {"a": entry("BF16", [2, 2], 0, 8)}, raw.tobytes())
    with safe_open(path, "numpy") as reference:
        assert reference.get_slice("a").get_dtype() == "BF16"
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.tensors["a"].type == "BF16"
    assert np.array_equal(dequantize("BF16", checkpoint.read_rows("a", 1, 1), 2), values[1:])


def write_shards(directory: Path, weight_map: dict[str, Any] | None = None) -> None:
    write_config(directory)
    for i in range(2):
        tensors = {f"{i}.{name}": np.full((2, 3), i, np.float32) for name in "ab"}
        save_file(tensors, directory / f"model-{i}.safetensors")
    if weight_map is None:
        weight_map = {f"{i}.{name}": f"model-{i}.safetensors" for i in range(2) for name in "ab"}
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.files == tuple(tmp_path / f"model-{i}.safetensors" for i in range(2))
    assert list(checkpoint.tensors) == ["0.a", "0.b", "1.a", "1.b"]
    for name in checkpoint.tensors:
        assert (checkpoint.read_rows(name, 0, 2).view("<f4") == int(name[0])).all()


def test_shard_lies_behind_a_link(tmp_path: Path) -> None:
    """As in the cache of huggingface-hub."""
    write_shards(tmp_path)
    blob = (tmp_path / "model-0.safetensors").rename(tmp_path / "blob")
    (tmp_path / "model-0.safetensors").symlink_to(blob)
    assert "0.a" in SafetensorsCheckpoint(tmp_path).tensors


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"0.a": "../model-0.safetensors"}, "no shard's name"),
        ({"0.a": "/model-0.safetensors"}, "no shard's name"),
        ({"0.a": "sub\\model.safetensors"}, "no shard's name"),
        ({"0.a": "model-0.bin"}, "no shard's name"),
        ({"0.a": ["model-0.safetensors"]}, "no shard's name"),
        ({"0.a\n": "model-0.safetensors"}, "no tensor name"),
        ({"0.a": "model-7.safetensors"}, "model-7.safetensors: no such file"),
        ({"0.z": "model-0.safetensors"}, "lacks tensor '0.z'"),
        (["0.a"], "no weight_map"),
    ],
)
def test_faults_of_an_index(tmp_path: Path, weight_map: Any, expected: str) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(TaelError, match=expected):
        SafetensorsCheckpoint(tmp_path)


def test_faults_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(TaelError, match=r"config.json: no such file"):
        SafetensorsCheckpoint(tmp_path)
    write_config(tmp_path)
    with pytest.raises(TaelError, match=r"has no model.safetensors; pull the model"):
        SafetensorsCheckpoint(tmp_path)
    for contents in (b"", b"[]", b"{", b"\xff{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000):
        (tmp_path / "config.json").write_bytes(contents)
        with pytest.raises(TaelError, match=r"config\.json is damaged"):
            SafetensorsCheckpoint(tmp_path)
    os.truncate(tmp_path / "config.json", MAX_JSON_BYTES + 1)
    with pytest.raises(TaelError, match="is the most allowed"):
        SafetensorsCheckpoint(tmp_path)


# Hostile files: as in test_gguf_hostile.py.


def load(directory: Path) -> SafetensorsCheckpoint | None:
    """Open and check a model; None where it was refused as it should be."""
    try:
        checkpoint = SafetensorsCheckpoint(directory)
    except TaelError as error:
        message = str(error)
        assert str(directory) in message and "; " in message
        assert message.isprintable() and len(message) < 2000
        return None
    for name, info in checkpoint.tensors.items():
        assert name == info.name
        row_bytes = FORMATS[info.type].row_bytes(info.shape[-1])
        num_rows = prod(info.shape[:-1])
        assert checkpoint.read_rows(name, 0, num_rows).shape == (num_rows, row_bytes)
    return checkpoint


@pytest.fixture
def valid(tmp_path: Path) -> bytes:
    write_model(write_config(tmp_path))
    assert load(tmp_path) is not None
    return (tmp_path / "model.safetensors").read_bytes()


@pytest.fixture
def memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.usefixtures("memory")
def test_truncated_or_extended(tmp_path: Path, valid: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(valid + b"\0")
    assert load(tmp_path) is None
    for length in reversed(range(len(valid))):
        os.truncate(path, length)
        assert load(tmp_path) is None, length


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_every_header_byte_flipped(tmp_path: Path, valid: bytes, flip: int) -> None:
    (header_bytes,) = struct.unpack_from("<Q", valid)
    with open(tmp_path / "model.safetensors", "r+b", buffering=0) as file:
        for at in range(8 + header_bytes):
            os.pwrite(file.fileno(), bytes([valid[at] ^ flip]), at)
            load(tmp_path)
            os.pwrite(file.fileno(), valid[at : at + 1], at)
    assert load(tmp_path) is not None


ODD = st.sampled_from([None, True, -1, 2**70, 0.5, float("nan"), "F32", [], [[1]], {}, {"a": 1}])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64"]) | ODD,
        "shape": st.lists(st.integers(-1, 8) | ODD, max_size=3) | ODD,
        "data_offsets": st.lists(st.sampled_from([0, 8, 16, 32]) | ODD, max_size=3) | ODD,
    }
)


@settings(
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(header=st.dictionaries(st.sampled_from("abc"), ENTRY | ODD, max_size=3) | ODD)
def test_random_headers(tmp_path: Path, header: Any) -> None:
    write_file(tmp_path, header)
    load(tmp_path)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": entry("I64", [4], 0, 32)}, "tensor 'a' has type 'I64', which Tael does not read"),
        ({"a": entry("F8_E4M3", [32], 0, 32)}, "tensor 'a' has type 'F8_E4M3'"),
        ({"a": entry("F32", [4], 0, 16)}, "tensors end at byte"),
        ({"a": entry("F32", [8], 0, 32), "b": entry("F32", [4], 16, 32)}, "'b' starts at 16"),
        ({"a": entry("F32", [4], 16, 32)}, "'a' starts at 16 and not at 0"),
        ({"a": entry("F32", [4], -16, 0)}, "'a' starts at -16"),
        ({"a": entry("F32", [8], 32, 0)}, r"'a' of shape \(8,\) has -32 bytes"),
        ({"a": entry("F32", [9], 0, 32)}, r"'a' of shape \(9,\) has 32 bytes"),
        ({"a": entry("F32", [2**40, 2**40], 0, 32)}, "'a' has an impossible shape"),
        ({"a": entry("F32", [1] * 9, 0, 32)}, "'a' has an impossible shape"),
        ({"a": entry("F32", [0, 8], 0, 0)}, "'a' has an impossible shape"),
        ({"a": entry("F32", [True, 8], 0, 32)}, "'a' has an impossible shape"),
        ({"a": entry("F32", [8], 0.0, 32)}, "description of tensor 'a' is incomplete"),
        ({"a": entry("F32", [8], 0)}, "description of tensor 'a' is incomplete"),
        ({"a": 1}, "description of tensor 'a' is incomplete"),
        ({"\x1b[2J": entry("F32", [8], 0, 32)}, "is no tensor name"),
        ({"a" * 999: entry("F32", [8], 0, 32)}, "is no tensor name"),
        ({"\ud800": entry("F32", [8], 0, 32)}, "is no tensor name"),
    ],
)
def test_fault_is_named(tmp_path: Path, header: dict[str, Any], expected: str) -> None:
    write_file(tmp_path, header)
    with pytest.raises(TaelError, match=expected):
        SafetensorsCheckpoint(tmp_path)
    assert load(tmp_path) is None


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("header_bytes", [2**26, 2**62, 2**64 - 1])
def test_header_is_bounded(tmp_path: Path, header_bytes: int) -> None:
    path = write_config(tmp_path) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", header_bytes))
    os.truncate(path, 2**27)
    assert load(tmp_path) is None
