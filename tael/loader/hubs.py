"""``hf:`` and ``ms:``: models on Hugging Face and ModelScope.

Both hubs offer the same: a list of files with sizes and digests, and an address for each that
can be read from any byte on. What of a repository makes a model is decided here, once: its one
.gguf file, or ``config.json``, tokenizer and safetensors. Pickles (.bin, .pt) are never fetched.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tael.errors import TaelError
from tael.loader import download
from tael.loader.download import Progress
from tael.loader.paths import models_dir

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# Path components that start with a letter or digit: no "..", no hidden file, no absolute path.
_FILE = re.compile(r"([A-Za-z0-9_][^/\\\0]*/)*[A-Za-z0-9_][^/\\\0]*")
# A GGUF model in several files is opened by the first.
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
# "model*": Mistral repositories hold the weights a second time as consolidated.safetensors.
_SNAPSHOT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "model*.safetensors",
)
_MAX_LISTING_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository. ``size`` in bytes; ``headers`` belong to the request for it."""

    path: str
    size: int
    sha256: str | None
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HubModel:
    """``SCHEME:OWNER/REPO[:FILE]``. Without a file: the model that the repository holds."""

    scheme: str
    repo: str
    file: str | None

    @classmethod
    def parse(cls, scheme: str, rest: str) -> HubModel:
        repo, _, file = rest.partition(":")
        if not _REPO.fullmatch(repo) or (file and not _FILE.fullmatch(file)):
            raise TaelError(
                f'cannot read "{scheme}:{rest}"; write {scheme}:OWNER/REPO or '
                f"{scheme}:OWNER/REPO:FILE.gguf."
            )
        if file and not file.endswith(".gguf"):
            raise TaelError(
                f"{file} is not a .gguf file; write {scheme}:{repo} for a model in safetensors."
            )
        return cls(scheme, repo, file or None)

    @property
    def name(self) -> str:
        return f"{self.scheme}:{self.repo}" + (f":{self.file}" if self.file else "")

    @property
    def directory(self) -> Path:
        return models_dir() / self.scheme / self.repo

    @property
    def _choice(self) -> Path:
        """Written when a repository was fetched in full: what of it is the model."""
        return self.directory / ".model"

    def locate(self) -> Path | None:
        if self.file is not None:
            path = self.directory / self.file
        elif self._choice.is_file():
            path = self.directory / self._choice.read_text(encoding="utf-8")
        else:
            return None
        return path if path.exists() else None

    def fetch(self, progress: Progress) -> Path:
        with download.exclusive(self._choice, progress):
            if (found := self.locate()) is not None:
                return found
            files = choose(self.name, LISTINGS[self.scheme](self.repo), self.file)
            # The first file comes last: once it is there, all are.
            missing = [f for f in files[::-1] if not self._has(f)]
            missing_bytes = sum(f.size for f in missing)
            parts = (download.part_path(self.directory / f.path) for f in missing)
            present_bytes = sum(p.stat().st_size for p in parts if p.exists())
            download.require_space(self.directory, missing_bytes - present_bytes)
            progress.start(f"pulling {self.name}", missing_bytes)
            done_bytes = 0
            for file in missing:
                target = self.directory / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                download.fetch_url(
                    file.url, file.headers, target, file.size, file.sha256, progress, done_bytes
                )
                done_bytes += file.size
            model = files[0].path if files[0].path.endswith(".gguf") else "."
            if self.file is None:
                download.part_path(self._choice).write_text(model, encoding="utf-8")
                download.place(self._choice, None, None)
        return self.directory / model

    def _has(self, file: RemoteFile) -> bool:
        path = self.directory / file.path
        return path.is_file() and path.stat().st_size == file.size

    def remove(self) -> int:
        if not self.directory.is_dir():
            return 0
        with download.exclusive(self._choice, download.Silent()):
            if self.file is not None:
                return sum(download.remove(self.directory / p) for p in _all_parts(self.file))
            freed_bytes = download.directory_bytes(self.directory)
            shutil.rmtree(self.directory)
        return freed_bytes


def choose(name: str, files: Sequence[RemoteFile], file: str | None) -> list[RemoteFile]:
    """The files to fetch, the one that opens the model first: a .gguf with its parts, or those
    of a Hugging Face directory."""
    by_path = {f.path: f for f in files}
    ggufs = [
        path
        for path in sorted(by_path)
        if path.endswith(".gguf") and _FILE.fullmatch(path) and _all_parts(path)[0] == path
    ]
    if file is None:
        snapshot = [p for p in by_path if any(fnmatch.fnmatchcase(p, s) for s in _SNAPSHOT)]
        snapshot = [p for p in snapshot if "/" not in p]
        if "config.json" in snapshot and any(p.endswith(".safetensors") for p in snapshot):
            return [by_path[p] for p in snapshot]
        if len(ggufs) == 1:
            file = ggufs[0]
    if file in ggufs and by_path.keys() >= set(_all_parts(file)):
        return [by_path[p] for p in _all_parts(file)]
    if ggufs:
        hint = f"add one of these after a colon: {', '.join(ggufs[:12])}"
    else:
        hint = "the repository holds no .gguf file, and no safetensors with a config.json"
    raise TaelError(f"{name} names no model file; {hint}.")


def _all_parts(path: str) -> list[str]:
    """Every file of the GGUF model that ``path`` belongs to, the one that opens it first."""
    part = _PART.fullmatch(path)
    if part is None:
        return [path]
    count = int(part["count"])
    return [f"{part['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, max(1, count) + 1)]


def _list_huggingface(repo: str) -> list[RemoteFile]:
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except HfHubHTTPError as error:
        raise TaelError(
            f"cannot list hf:{repo}: the hub answers {error.response.status_code}; check the name, "
            "and log in (hf auth login) if the model asks for it."
        ) from error
    # No connection, or offline mode: the errors of whichever HTTP package this version of the
    # library uses (requests, httpx and httpx2 so far), which share no base.
    except Exception as error:
        raise _no_connection("hf", repo, error) from error
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return [
        RemoteFile(
            path=sibling.rfilename,
            size=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs is not None else None,
            url=hf_hub_url(repo, sibling.rfilename, revision=info.sha),
            headers=headers,
        )
        for sibling in info.siblings or ()
        if sibling.size is not None
    ]


def _list_modelscope(repo: str) -> list[RemoteFile]:
    """Addresses as in modelscope/hub/api.py and modelscope/hub/file_download.py."""
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")
    base = f"{endpoint}/api/v1/models/{repo}/repo"
    try:
        with download.open_url(f"{base}/files?Revision=master&Recursive=true", {}) as response:
            listing = json.loads(response.read(_MAX_LISTING_BYTES))
        return [
            RemoteFile(
                path=str(file["Path"]),
                size=int(file["Size"]),
                sha256=file.get("Sha256") or None,
                url=f"{base}?"
                + urllib.parse.urlencode({"Revision": "master", "FilePath": file["Path"]}),
            )
            for file in listing["Data"]["Files"]
            if file["Type"] != "tree"
        ]
    except OSError as error:
        raise _no_connection("ms", repo, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TaelError(
            f"cannot list ms:{repo}: the answer of {endpoint} is not a file list; check the name."
        ) from error


def _no_connection(scheme: str, repo: str, error: Exception) -> TaelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TaelError(f"cannot list {scheme}:{repo}: {reason}; check the name and the network.")


LISTINGS: Mapping[str, Callable[[str], list[RemoteFile]]] = {
    "hf": _list_huggingface,
    "ms": _list_modelscope,
}
