"""GGUF files written by the gguf package read back as they were written."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.loader.gguf import GGUFCheckpoint
from tael.quant.formats import FORMATS


def random_raw(name: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes of a tensor, [*outer, row_bytes]."""
    row_bytes = FORMATS[name].row_bytes(shape[-1])
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)


def add_tensor(writer: gguf.GGUFWriter, name: str, format: str, raw: NDArray[np.uint8]) -> None:
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[format])


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_format(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    raw = {name: random_raw(name, (6, 512), seed) for seed, name in enumerate(FORMATS)}
    for name in FORMATS:
        add_tensor(writer, f"{name}.weight", name, raw[name])
    finish(writer)

    checkpoint: Checkpoint = GGUFCheckpoint(path)
    assert checkpoint.format == "gguf"
    assert checkpoint.files == (path,)
    assert list(checkpoint.tensors) == [f"{name}.weight" for name in FORMATS]
    for name in FORMATS:
        info = checkpoint.tensors[f"{name}.weight"]
        assert (info.name, info.type, info.shape) == (f"{name}.weight", name, (6, 512))
        assert np.array_equal(checkpoint.read_rows(info.name, 0, 6), raw[name])
        assert np.array_equal(checkpoint.read_rows(info.name, 2, 3), raw[name][2:5])
        assert checkpoint.read_rows(info.name, 6, 0).shape == (0, raw[name].shape[1])


def test_vectors_and_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    vector, experts = random_raw("F32", (5,)), random_raw("Q8_0", (3, 4, 32))
    add_tensor(writer, "norm.weight", "F32", vector)
    add_tensor(writer, "experts.weight", "Q8_0", experts)
    finish(writer)

    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.tensors["norm.weight"].shape == (5,)
    assert np.array_equal(checkpoint.read_rows("norm.weight", 0, 1), vector[None])
    assert checkpoint.tensors["experts.weight"].shape == (3, 4, 32)
    assert np.array_equal(checkpoint.read_rows("experts.weight", 4, 8), experts.reshape(12, -1)[4:])
    with pytest.raises(IndexError):
        checkpoint.read_rows("experts.weight", 11, 2)


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 4_000_000_000,
        "int32": -2_000_000_000,
        "uint64": 2**63,
        "int64": -(2**62),
        "float32": 0.25,
        "float64": 1e-300,
        "bool": True,
        "string": "Grüße, 世界",
    }
    for name, value in scalars.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_array("x.strings", ["", "a", "世界"])
    writer.add_key_value(
        "x.ints", [1, -2, 3], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.INT16
    )
    writer.add_array("x.bools", [True, False])
    writer.add_array("x.floats", [0.5, 1.5])
    finish(writer)

    metadata = GGUFCheckpoint(path).metadata
    for name, value in scalars.items():
        assert metadata[f"x.{name}"] == value
        assert type(metadata[f"x.{name}"]) is type(value)
    assert metadata["general.architecture"] == "llama"
    assert metadata["x.strings"] == ["", "a", "世界"]
    assert metadata["x.ints"].dtype == np.int16 and metadata["x.ints"].tolist() == [1, -2, 3]
    assert metadata["x.bools"].dtype == np.bool_ and metadata["x.bools"].tolist() == [True, False]
    assert metadata["x.floats"].dtype == np.float32 and metadata["x.floats"].tolist() == [0.5, 1.5]


def test_token_bytes_survive(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokens = [b"\xff\xfe", b"half \xe4\xb8", b"\xed\xa0\x80", "世".encode()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", tokens)
    writer.add_key_value("author", b"J\xf6rg", gguf.GGUFValueType.STRING)
    finish(writer)

    metadata = GGUFCheckpoint(path).metadata
    assert [token.encode("utf-8", "surrogateescape") for token in metadata["tokens"]] == tokens
    assert metadata["author"] == "J\ufffdrg"


@pytest.mark.parametrize("alignment", [1, 8, 256])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    raw = [random_raw("Q4_0", (n, 32), seed=n) for n in (1, 2, 3)]
    for i, rows in enumerate(raw):
        add_tensor(writer, f"{i}", "Q4_0", rows)
    finish(writer)

    checkpoint = GGUFCheckpoint(path)
    for i, rows in enumerate(raw):
        assert np.array_equal(checkpoint.read_rows(f"{i}", 0, len(rows)), rows)


def write_parts(directory: Path) -> list[Path]:
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        add_tensor(writer, f"{i}", "F16", random_raw("F16", (2, 8), seed=i))
    finish(writer)
    return [directory / f"model-{part:05}-of-00003.gguf" for part in (1, 2, 3)]


def test_parts(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    checkpoint = GGUFCheckpoint(parts[0])
    assert checkpoint.files == tuple(parts)
    for i in range(5):
        expected = random_raw("F16", (2, 8), seed=i)
        assert np.array_equal(checkpoint.read_rows(f"{i}", 0, 2), expected)


def test_faults_in_parts(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path)
    with pytest.raises(TaelError, match=r"open model-00001-of-00003.gguf instead"):
        GGUFCheckpoint(second)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(TaelError, match=r"is a part of 3 and was renamed"):
        GGUFCheckpoint(renamed)
    renamed.rename(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(TaelError, match=r"tensor '2' is in an earlier part too"):
        GGUFCheckpoint(first)
    third.unlink()
    with pytest.raises(TaelError, match=r"00003-of-00003.gguf: no such file"):
        GGUFCheckpoint(first)


def test_file_replaced_or_shortened_after_opening(tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other"
    writer = gguf.GGUFWriter(path, "llama")
    raw = random_raw("F32", (4, 4))
    add_tensor(writer, "a", "F32", raw)
    finish(writer)
    checkpoint = GGUFCheckpoint(path)
    path.rename(other)
    path.write_bytes(b"another model")
    assert np.array_equal(checkpoint.read_rows("a", 0, 4), raw)
    other.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(TaelError, match=r"became shorter"):
        checkpoint.read_rows("a", 0, 4)


def test_faults_of_paths(tmp_path: Path) -> None:
    with pytest.raises(TaelError, match=r"missing.gguf: no such file"):
        GGUFCheckpoint(tmp_path / "missing.gguf")
    with pytest.raises(TaelError, match=r"no such file"):
        GGUFCheckpoint(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(TaelError, match=r"it is empty"):
        GGUFCheckpoint(tmp_path / "empty.gguf")
    with pytest.raises(TaelError):
        GGUFCheckpoint(tmp_path / ("x" * 300))
