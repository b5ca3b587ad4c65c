"""hf: and ms: against a server of this machine that speaks both."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request

import pytest
from huggingface_hub import constants

from tael.errors import TaelError
from tael.loader import sources
from tael.loader.download import Silent, _Redirect
from tael.loader.hubs import HubModel, RemoteFile, choose
from tael.loader.paths import models_dir

GGUF = b"GGUF" + bytes(range(256)) * 64
SNAPSHOT = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the weights once more",
    "model_fp16/model.safetensors": b"another model",
}


class Hub(ThreadingHTTPServer):
    """Serves ``files`` of the one repository owner/repo."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.digests: dict[str, str] = {}
        self.break_after: int | None = None
        """Bytes of a body after which the connection ends; once."""
        self.requests: list[tuple[str, str | None]] = []
        """(path, Range) of every request for a file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha256(self, path: str) -> str:
        return self.digests.get(path, hashlib.sha256(self.files[path]).hexdigest())

    @property
    def fetched(self) -> list[str]:
        return [path for path, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        files = self.server.files
        if url.path == "/api/models/owner/repo":
            siblings = [
                {
                    "rfilename": path,
                    "size": len(content),
                    "blobId": "0",
                    "lfs": {
                        "size": len(content),
                        "sha256": self.server.sha256(path),
                        "pointerSize": 1,
                    },
                }
                for path, content in files.items()
            ]
            self.reply(json.dumps({"id": "owner/repo", "sha": "c0ffee", "siblings": siblings}))
        elif url.path == "/api/v1/models/owner/repo/repo/files":
            listed = [
                {
                    "Path": path,
                    "Size": len(content),
                    "Type": "blob",
                    "Sha256": self.server.sha256(path),
                }
                for path, content in files.items()
            ]
            folder = {"Path": "model_fp16", "Size": 0, "Type": "tree", "Sha256": ""}
            self.reply(json.dumps({"Code": 200, "Data": {"Files": [folder, *listed]}}))
        elif url.path == "/api/v1/models/owner/repo/repo":
            self.send_file(parse_qs(url.query)["FilePath"][0])
        elif match := re.fullmatch(r"/owner/repo/resolve/c0ffee/(.*)", url.path):
            self.send_file(unquote(match[1]))
        else:
            self.send_error(404)

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def send_file(self, path: str) -> None:
        content = self.server.files[path]
        byte_range = self.headers.get("Range")
        self.server.requests.append((path, byte_range))
        start = int(byte_range.removeprefix("bytes=").removesuffix("-")) if byte_range else 0
        self.send_response(206 if byte_range else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if self.server.break_after is not None:
            end, self.server.break_after = start + self.server.break_after, None
        self.wfile.write(content[start:end])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


both = pytest.mark.parametrize("scheme", ["hf", "ms"])


@both
def test_one_gguf(hub: Hub, scheme: str) -> None:
    hub.files = {"README.md": b"", "sub/m-Q4.gguf": GGUF, "m-Q8.gguf": GGUF * 2}
    path = sources.resolve(f"{scheme}:owner/repo:sub/m-Q4.gguf")
    assert path == models_dir() / scheme / "owner" / "repo" / "sub" / "m-Q4.gguf"
    assert path.read_bytes() == GGUF
    assert hub.fetched == ["sub/m-Q4.gguf"]
    hub.shutdown()  # a pulled model needs no network
    assert sources.resolve(f"{scheme}:owner/repo:sub/m-Q4.gguf") == path


@both
def test_the_only_gguf_needs_no_name(hub: Hub, scheme: str) -> None:
    hub.files = {"README.md": b"", "m-Q4.gguf": GGUF}
    path = sources.resolve(f"{scheme}:owner/repo")
    assert path.read_bytes() == GGUF
    hub.shutdown()
    assert sources.resolve(f"{scheme}:owner/repo") == path


@both
def test_directory(hub: Hub, scheme: str) -> None:
    hub.files = dict(SNAPSHOT)
    path = sources.resolve(f"{scheme}:owner/repo")
    present = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    assert present == set(list(SNAPSHOT)[:5])
    assert sorted(hub.fetched) == sorted(present)
    assert sources.resolve(f"{scheme}:owner/repo") == path
    assert len(hub.fetched) == len(present)


def test_broken_connection_is_taken_up_again(hub: Hub) -> None:
    hub.files = {"m.gguf": GGUF}
    hub.break_after = 1000
    assert sources.resolve("ms:owner/repo:m.gguf").read_bytes() == GGUF
    assert hub.requests == [("m.gguf", None), ("m.gguf", "bytes=1000-")]


def test_killed_pull_goes_on(hub: Hub) -> None:
    hub.files = {"m.gguf": GGUF}
    target = models_dir() / "ms" / "owner" / "repo" / "m.gguf"
    target.parent.mkdir(parents=True)
    (target.parent / "m.gguf.part").write_bytes(GGUF[:5000])
    assert sources.resolve("ms:owner/repo:m.gguf").read_bytes() == GGUF
    assert hub.requests == [("m.gguf", "bytes=5000-")]


def test_directory_is_there_only_when_complete(hub: Hub) -> None:
    hub.files = dict(SNAPSHOT)
    hub.digests["model-00002-of-00002.safetensors"] = "0" * 64
    with pytest.raises(TaelError, match="sha256"):
        sources.resolve("hf:owner/repo")
    with pytest.raises(TaelError, match="tael pull"):
        sources.resolve("hf:owner/repo", pull=False)
    hub.digests.clear()
    path = sources.resolve("hf:owner/repo")
    assert (path / "model-00002-of-00002.safetensors").read_bytes() == b"second shard"
    assert not list(path.glob("*.part"))


def test_split_gguf_is_there_only_when_complete(hub: Hub) -> None:
    first, second = (f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    hub.files = {first: GGUF, second: GGUF}
    hub.digests[second] = "0" * 64
    with pytest.raises(TaelError, match="sha256"):
        sources.resolve(f"ms:owner/repo:{first}")
    with pytest.raises(TaelError, match="tael pull"):
        sources.resolve(f"ms:owner/repo:{first}", pull=False)
    hub.digests.clear()
    path = sources.resolve(f"ms:owner/repo:{first}")
    assert (path.name, path.with_name(second).read_bytes()) == (first, GGUF)
    assert sources.remove(f"ms:owner/repo:{first}") == 2 * len(GGUF)


@both
def test_unknown_repository(hub: Hub, scheme: str) -> None:
    with pytest.raises(TaelError, match=f"cannot list {scheme}:owner/other") as caught:
        sources.resolve(f"{scheme}:owner/other")
    assert "404" in str(caught.value)
    assert "\n" not in str(caught.value)


@both
def test_no_network(hub: Hub, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.server_close()  # the port now refuses
    with pytest.raises(TaelError, match="check the name and the network") as caught:
        sources.resolve(f"{scheme}:owner/repo")
    assert "\n" not in str(caught.value)


def test_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"m.gguf": GGUF}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(TaelError, match="not enough disk space"):
        sources.resolve("ms:owner/repo")
    assert hub.fetched == []


def test_disk_that_fills_up_on_the_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"m.gguf": GGUF}

    def full(progress: Silent, completed_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Silent, "update", full)
    with pytest.raises(TaelError, match=r"No space left on device .*; free disk space"):
        sources.resolve("ms:owner/repo")
    assert hub.fetched == ["m.gguf"]


def test_remove(hub: Hub) -> None:
    hub.files = {"a.gguf": GGUF, "b.gguf": GGUF}
    a, b = (sources.resolve(f"ms:owner/repo:{name}.gguf") for name in "ab")
    assert sources.remove("ms:owner/repo:a.gguf") == len(GGUF)
    assert not a.exists() and b.exists()
    assert sources.remove("ms:owner/repo") >= len(GGUF)
    assert not b.parent.exists()


def test_token_stays_with_the_hub(hub: Hub) -> None:
    """The storage host that a hub redirects to must not see the user's token."""
    request = Request("https://hub.example/file", headers={"Authorization": "Bearer secret"})
    same = _Redirect().redirect_request(request, None, 302, "", {}, "https://hub.example/other")
    other = _Redirect().redirect_request(request, None, 302, "", {}, "https://cdn.example/file")
    assert same is not None and same.has_header("Authorization")
    assert other is not None and not other.has_header("Authorization")


def remote(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, None, "") for path in paths]


def test_all_parts_of_a_split_gguf_come_with_the_first() -> None:
    files = remote("q4/m-00002-of-00002.gguf", "q4/m-00001-of-00002.gguf", "x.gguf")
    chosen = choose("hf:o/r", files, "q4/m-00001-of-00002.gguf")
    assert [f.path for f in chosen] == ["q4/m-00001-of-00002.gguf", "q4/m-00002-of-00002.gguf"]
    with pytest.raises(TaelError, match=r"q4/m-00001-of-00002\.gguf, x\.gguf"):
        choose("hf:o/r", files, None)
    with pytest.raises(TaelError, match="names no model file"):
        choose("hf:o/r", files[1:], "q4/m-00001-of-00002.gguf")


def test_hostile_listing_cannot_leave_the_cache() -> None:
    for path in ("../m.gguf", "/etc/m.gguf", "a/../../m.gguf", "a\\..\\m.gguf"):
        with pytest.raises(TaelError, match=r"no \.gguf file"):
            choose("hf:o/r", remote(path), None)


def test_pickles_are_not_a_model() -> None:
    with pytest.raises(TaelError, match="no safetensors"):
        choose("hf:o/r", remote("config.json", "pytorch_model.bin"), None)


def test_names() -> None:
    assert HubModel.parse("hf", "o/r:d/m.gguf") == HubModel("hf", "o/r", "d/m.gguf")
    assert HubModel.parse("ms", "o/r.v1") == HubModel("ms", "o/r.v1", None)
