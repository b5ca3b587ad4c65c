"""Whatever file or message is a pickle instead, nothing in it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from byte_llama import save_byte_llama

from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.economics.rate_card import RateCard
from tael.errors import TaelError
from tael.llm import LLM
from tael.loader.modes import read_calibration
from tael.loader.prepared import load_prepared, open_checkpoint
from tael.loader.tile_file import open_tile_file
from tael.loader.tokenizer import Tokenizer
from tael.memory.tiers import block_file
from tael.memory.tiers.files import PAGE
from tael.server.messages import command_decoder, report_decoder


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def archived(content: bytes) -> bytes:
    """As torch saves a checkpoint."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return buffer.getvalue()


FORMS: dict[str, Callable[[Canary], bytes]] = {
    "text": lambda canary: pickle.dumps(canary, 0),
    "binary": pickle.dumps,
    "archive": lambda canary: archived(pickle.dumps(canary, 2)),
    "padded": lambda canary: pickle.dumps(canary).ljust(2 * PAGE, b"\0"),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_byte_llama(path)
    return path


def in_folder(name: str) -> Callable[[Path, Path], object]:
    """Load a model folder in which one file is the payload."""

    def load(payload: Path, model: Path) -> object:
        folder = payload.with_name("folder")
        shutil.copytree(model, folder)
        (folder / name).unlink(missing_ok=True)
        if name in ("pytorch_model.bin", "model.safetensors.index.json"):
            (folder / "model.safetensors").unlink()
        shutil.copy(payload, folder / name)
        return LLM(str(folder), backend="reference")

    return load


def gguf_file(payload: Path, model: Path) -> object:
    return open_checkpoint(payload.rename(payload.with_suffix(".gguf")))


def tokenizer_record(payload: Path, model: Path) -> object:
    shutil.copy(model / "tokenizer.json", payload.with_name("tokenizer.json"))
    return Tokenizer.load(payload.rename(payload.with_name("tokenizer_meta.json")).parent)


def kv_block(payload: Path, model: Path) -> object:
    content = payload.read_bytes().ljust(PAGE, b"\0")
    return block_file.read_header(np.frombuffer(content, np.uint8))


READERS: dict[str, Callable[[Path, Path], object]] = {
    "gguf": gguf_file,
    "safetensors": in_folder("model.safetensors"),
    "safetensors index": in_folder("model.safetensors.index.json"),
    "torch checkpoint": in_folder("pytorch_model.bin"),
    "config": in_folder("config.json"),
    "tokenizer": in_folder("tokenizer.json"),
    "tokenizer record": tokenizer_record,
    "prepared weights": lambda payload, _: open_tile_file(payload),
    "calibration": lambda payload, _: read_calibration(payload),
    "kv block": kv_block,
    "rate card": lambda payload, _: RateCard.load(payload),
    "keys": lambda payload, _: Keys(payload),
    "ledger": lambda payload, _: Ledger(payload, RateCard("1", "USD", ())),
    "command to the engine": lambda payload, _: command_decoder.decode(payload.read_bytes()),
    "report of the engine": lambda payload, _: report_decoder.decode(payload.read_bytes()),
}

REFUSALS = (TaelError, block_file.CorruptError, msgspec.DecodeError, ValueError)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_a_pickle(reader: str, form: str, model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = tmp_path / "payload"
    payload.write_bytes(FORMS[form](Canary(canary)))
    with pytest.raises(REFUSALS):
        READERS[reader](payload, model)
    assert not canary.exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    """Positive control."""
    pickle.loads(FORMS["binary"](Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_damaged_prepared_model_is_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_byte_llama(tmp_path, head_dim=16)
    load_prepared(tmp_path)
    (prepared,) = (path.parent for path in (tmp_path / "cache").rglob("spec.json"))
    for path in sorted(prepared.iterdir()):
        path.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    load_prepared(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_code_beside_a_model_is_not_imported(model: Path, tmp_path: Path) -> None:
    """``auto_map`` is how a checkpoint asks transformers to run what comes with it."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    evil = f"import os; os.mkdir({str(tmp_path / 'canary')!r})"
    for name in ("evil", "configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(evil)
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        fields["auto_map"] = {**names, "AutoTokenizer": ["tokenization_evil.Tokenizer", None]}
        (folder / name).write_text(json.dumps(fields))
    with LLM(str(folder), backend="reference") as llm:
        assert llm.generate("abc")[0].text
    assert not (tmp_path / "canary").exists()
