"""Bringing bytes into the cache: a file appears under its name whole and checked, or not at all.

Until then its bytes are in ``<name>.part``, from which an interrupted pull goes on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Protocol
from urllib.request import Request

from tael.errors import TaelError

CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_POLL_S = 0.2
_MAX_BREAKS = 3


class Progress(Protocol):
    """Shows a transfer. ``update`` may be called from another thread."""

    def start(self, description: str, total_bytes: int) -> None:
        """Begin to show a transfer; a total of 0 means unknown."""

    def update(self, completed_bytes: int) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, description: str, total_bytes: int) -> None:
        pass

    def update(self, completed_bytes: int) -> None:
        pass


def part_path(target: Path) -> Path:
    return target.with_name(target.name + ".part")


@contextmanager
def exclusive(target: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time write ``target``. The kernel drops the lock of a dead process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.start(f"waiting for another process to pull {target.name}", 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def watched(progress: Progress, measure: Callable[[], int]) -> Iterator[None]:
    """Show the progress of a tool that reports none itself, from the bytes it has written."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            progress.update(measure())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def directory_bytes(directory: Path) -> int:
    """Bytes of the files under a directory that others may be writing."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise TaelError unless the file system of ``directory`` has ``needed_bytes`` free."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise TaelError(
            f"not enough disk space in {directory}: {needed_bytes / 2**20:,.0f} MiB needed, "
            f"{free_bytes / 2**20:,.0f} MiB free; free some, or set XDG_CACHE_HOME to another disk."
        )


def check(path: Path, size: int | None, sha256: str | None) -> None:
    """Raise TaelError and delete the file unless size and digest are the expected ones."""
    actual_bytes = path.stat().st_size
    if size is not None and actual_bytes != size:
        path.unlink()
        raise TaelError(
            f"{path.name} has {actual_bytes} bytes instead of {size}; it was deleted: pull again."
        )
    if sha256 is not None and (actual := _sha256(path)) != sha256.lower():
        path.unlink()
        raise TaelError(
            f"{path.name} has sha256 {actual} instead of {sha256}: the download is damaged or "
            "was changed at its source; it was deleted: pull again."
        )


def place(target: Path, size: int | None, sha256: str | None) -> None:
    """Check the finished part file of ``target`` and move it to its name, durably."""
    part = part_path(target)
    check(part, size, sha256)
    _sync(part)
    os.replace(part, target)
    _sync(target.parent)


def remove(target: Path) -> int:
    """Delete a file and its part file, if they exist; return the bytes freed."""
    freed_bytes = 0
    for path in (target, part_path(target)):
        if path.exists():
            freed_bytes += path.stat().st_size
            path.unlink()
    return freed_bytes


def fetch_url(
    url: str,
    headers: Mapping[str, str],
    target: Path,
    size: int,
    sha256: str | None,
    progress: Progress,
    base_bytes: int,
) -> None:
    """Download ``url`` to ``target``, going on from its part file if there is one.

    Progress counts from ``base_bytes``. A broken connection is taken up again a few times.
    """
    part = part_path(target)
    for remaining in reversed(range(_MAX_BREAKS)):
        try:
            _append(url, headers, part, size, progress, base_bytes)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or not remaining:
                raise TaelError(
                    f"cannot download {url}: {error}; check the name and the network, then run "
                    "the command again: it goes on where it stopped."
                ) from error
        else:
            break
    place(target, size, sha256)


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """GET. Raises OSError."""
    # ModelScope refuses urllib's own User-Agent.
    request = Request(url, headers={"User-Agent": "tael", **headers})
    opener = urllib.request.build_opener(_Redirect)
    response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_S)
    return response


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Keeps a hub's token from the storage host that the hub redirects to."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and request.host != req.host:
            request.remove_header("Authorization")
        return request


def _append(
    url: str,
    headers: Mapping[str, str],
    part: Path,
    size: int,
    progress: Progress,
    base_bytes: int,
) -> None:
    """Download what is missing of ``part``; raise OSError or HTTPException when it breaks off."""
    offset = part.stat().st_size if part.exists() else 0
    if offset > size:
        part.unlink()
        offset = 0
    if offset == size and offset > 0:
        return
    byte_range = {"Range": f"bytes={offset}-"} if offset else {}
    with open_url(url, {**headers, **byte_range}) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.update(base_bytes + file.tell())
    if part.stat().st_size < size:
        raise ConnectionError(f"it ended after {part.stat().st_size} of {size} bytes")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
