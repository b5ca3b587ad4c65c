"""Whatever bytes a GGUF file holds, it loads with tensors that lie in it, or TaelError says in
one line what is wrong; and memory stays in proportion to the file."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tael.errors import TaelError
from tael.loader.gguf import MAX_HEADER_BYTES, GGUFCheckpoint
from tael.quant.formats import FORMATS

MAX_PEAK_BYTES = 1 << 20  # of allocations, for files of a few kilobytes


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model with metadata of every kind and a tensor of every format."""
    path = tmp_path_factory.mktemp("valid") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("n", 7)
    writer.add_float32("f", 0.5)
    writer.add_bool("b", True)
    writer.add_array("tokens", ["a", "", "bc", "世"])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("flags", [True, False])
    writer.add_custom_alignment(32)
    rng = np.random.default_rng(0)
    for name, format in FORMATS.items():
        raw = rng.integers(0, 256, (2, format.row_bytes(256)), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def header_bytes(data: bytes) -> int:
    """Where the last tensor's description ends."""
    return data.index(b"MXFP4") + 5 + 4 + 2 * 8 + 4 + 8


@pytest.fixture
def memory() -> Iterator[None]:
    """Fails the test when a load allocates out of proportion to its file."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES


def load(path: Path) -> GGUFCheckpoint | None:
    """Open and check a file; None where it was refused as it should be."""
    try:
        checkpoint = GGUFCheckpoint(path)
    except TaelError as error:
        message = str(error)
        assert str(path) in message and "; " in message
        assert message.isprintable() and len(message) < 2000
        return None
    for name, info in checkpoint.tensors.items():
        assert name == info.name
        row_bytes = FORMATS[info.type].row_bytes(info.shape[-1])
        num_rows = prod(info.shape[:-1])
        assert 0 < num_rows * row_bytes <= path.stat().st_size
        assert checkpoint.read_rows(name, 0, num_rows).shape == (num_rows, row_bytes)
    return checkpoint


def test_valid_file_loads(tmp_path: Path, valid: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid)
    checkpoint = load(path)
    assert checkpoint is not None and len(checkpoint.tensors) == len(FORMATS)


@pytest.mark.usefixtures("memory")
def test_truncated_anywhere(tmp_path: Path, valid: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid)
    header, data_end = header_bytes(valid), len(valid) - 16  # then padding, which may go
    for length in [data_end - 1, *range(data_end - 500, header, -500), *range(header, -1, -1)]:
        os.truncate(path, length)
        assert load(path) is None, length


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_every_header_byte_flipped(tmp_path: Path, valid: bytes, flip: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid)
    with open(path, "r+b", buffering=0) as file:
        for at in range(header_bytes(valid)):
            os.pwrite(file.fileno(), bytes([valid[at] ^ flip]), at)
            load(path)
            os.pwrite(file.fileno(), valid[at : at + 1], at)
    assert path.read_bytes() == valid


EXTREMES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
MUTATION = st.tuples(
    st.sampled_from(["overwrite", "insert", "delete"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=16)
    | st.sampled_from(EXTREMES).map(lambda value: value.to_bytes(8, "little")),
)


@settings(
    database=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
def test_random_mutations(
    tmp_path: Path, valid: bytes, mutations: list[tuple[str, float, bytes]]
) -> None:
    data = bytearray(valid)
    for kind, where, payload in mutations:
        at = int(where * header_bytes(valid))
        match kind:
            case "overwrite":
                data[at : at + len(payload)] = payload
            case "insert":
                data[at:at] = payload
            case "delete":
                del data[at : at + len(payload)]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    load(path)


# Files made by hand.


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


def key(name: bytes, type_id: int, payload: bytes) -> bytes:
    return text(name) + u32(type_id) + payload


def tensor(name: bytes, dims: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def file(keys: list[bytes], tensors: list[bytes]) -> bytes:
    header = b"GGUF" + u32(3) + u64(len(tensors)) + u64(len(keys)) + b"".join(keys + tensors)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(4096)


FAULTS: dict[str, tuple[bytes, str]] = {
    "magic": (b"GGML" + bytes(100), "is not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
    "version 1": (b"GGUF" + u32(1) + bytes(100), "version 1; convert it to version 3"),
    "version 2": (b"GGUF" + u32(2) + bytes(100), "version 2; convert it to version 3"),
    "many tensors": (b"GGUF" + u32(3) + u64(2**60) + u64(0), "claims 1152921504606846976 tensors"),
    "many keys": (b"GGUF" + u32(3) + u64(0) + u64(2**60), "claims 1152921504606846976 metadata"),
    "long key": (file([u64(2**40)], []), "bytes in a metadata key"),
    "empty key": (file([key(b"", 4, u32(1))], []), "is no metadata key"),
    "key with an escape": (file([key(b"\x1b[2J", 4, u32(1))], []), "is no metadata key"),
    "key not UTF-8": (file([key(b"\xff", 4, u32(1))], []), "is no metadata key"),
    "same key": (file([key(b"a", 4, u32(1))] * 2, []), "'a' appears twice"),
    "unknown type": (file([key(b"a", 13, u32(1))], []), "'a' has the unknown type 13"),
    "long string": (file([key(b"a", 8, u64(2**63))], []), "ends within its header"),
    "long array": (file([key(b"a", 9, u32(0) + u64(2**63))], []), "values of 'a'"),
    "array past the end": (file([key(b"a", 9, u32(10) + u64(2**21))], []), "ends within"),
    "strings past the end": (file([key(b"a", 9, u32(8) + u64(2**21))], []), "ends within"),
    "array of arrays": (file([key(b"a", 9, u32(9) + u64(1))], []), "'a' is an array of"),
    "alignment 24": (file([key(b"general.alignment", 4, u32(24))], []), "no power of two"),
    "alignment 0": (file([key(b"general.alignment", 4, u32(0))], []), "no power of two"),
    "alignment 0.5": (
        file([key(b"general.alignment", 6, struct.pack("<f", 0.5))], []),
        "not an integer",
    ),
    "parts of a list": (file([key(b"split.count", 9, u32(4) + u64(0))], []), "not an integer"),
    "parts missing": (file([key(b"split.tensors.count", 5, u32(2))], []), "hold 0 of 2 tensors"),
    "same tensor": (
        file([], [tensor(b"a", [8]), tensor(b"a", [8], offset=32)]),
        "'a' appears twice",
    ),
    "tensor name": (file([], [tensor(b"a\nb", [8])]), "is no tensor name"),
    "no dimension": (file([], [tensor(b"a", [])]), "'a' has 0 dimensions"),
    "five dimensions": (file([], [tensor(b"a", [1] * 5)]), "'a' has 5 dimensions"),
    "empty tensor": (file([], [tensor(b"a", [0, 2**63])]), "'a' cannot have shape"),
    "overflow": (file([], [tensor(b"a", [2**32] * 4)]), "its tensors end at byte"),
    "part of a block": (file([], [tensor(b"a", [40], 2)]), "'a' cannot have shape (40,) as Q4_0"),
    "type not read": (file([], [tensor(b"a", [256], 16)]), "'a' has type IQ2_XXS, which Tael"),
    "no type": (file([], [tensor(b"a", [256], 999)]), "'a' has type number 999"),
    "offset": (file([], [tensor(b"a", [8], 0, 32)]), "'a' starts at 32 and not at 0"),
    "overlap": (
        file([], [tensor(b"a", [64]), tensor(b"b", [64], offset=128)]),
        "'b' starts at 128 and not at 256",
    ),
    "past the end": (file([], [tensor(b"a", [1025])]), "its tensors end at byte"),
}


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(tmp_path: Path, fault: str) -> None:
    data, expected = FAULTS[fault]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert load(path) is None
    with pytest.raises(TaelError) as caught:
        GGUFCheckpoint(path)
    assert expected in str(caught.value)


def test_files_made_by_hand_can_load(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    keys = [key(b"a", 7, b"\x02"), key(b"b", 9, u32(7) + u64(3) + b"\0\x02\xff")]
    path.write_bytes(file(keys, [tensor(b"a", [8, 3]), tensor(b"b", [32], 2, 96)]))
    checkpoint = load(path)
    assert checkpoint is not None
    assert checkpoint.tensors["a"].shape == (3, 8)
    assert checkpoint.metadata["a"] is True
    assert checkpoint.metadata["b"].view(np.uint8).tolist() == [0, 1, 1]


def test_header_is_bounded(tmp_path: Path) -> None:
    """A sparse file of 1 GiB that is all header."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + u32(3) + u64(0) + u64(1) + key(b"a", 8, u64(2**29)))
    os.truncate(path, 2**30)
    tracemalloc.start()
    with pytest.raises(TaelError, match=f"header is longer than {MAX_HEADER_BYTES >> 20} MiB"):
        GGUFCheckpoint(path)
    assert tracemalloc.get_traced_memory()[1] < MAX_PEAK_BYTES
    tracemalloc.stop()
