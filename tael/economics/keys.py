"""API keys: who may call, on whose behalf, and how much."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tael.economics.database import open_database
from tael.errors import TaelError

APPLICATION_ID = 0x54614B79  # "TaKy"

TOKEN = re.compile("tael_([0-9a-f]{16})_([0-9a-f]{64})")

SCHEMA = """
CREATE TABLE keys (
    key_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    tenant TEXT NOT NULL,
    sharing_group TEXT,
    secret_hash BLOB NOT NULL,
    max_concurrency INTEGER,
    requests_per_min INTEGER,
    tokens_per_min INTEGER,
    weight INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
);;
CREATE TABLE salt_secret (secret BLOB NOT NULL);;
INSERT INTO salt_secret VALUES (randomblob(32))
"""

COLUMNS = (
    "key_id, name, tenant, sharing_group, max_concurrency, requests_per_min, tokens_per_min, "
    "weight, created_at, revoked_at"
)


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; the secret is not. Limits of None do not limit."""

    key_id: str
    """Public: it names the key in reports and in ``revoke``."""
    name: str
    tenant: str
    """Keys of one tenant share cached prefixes."""
    sharing_group: str | None = None
    """Tenants that opted in to share cached prefixes, and so to let each other find out which
    prompts are cached, use the same group."""
    max_concurrency: int | None = None
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    weight: int = 1
    """Of this key's share when several wait."""
    created_at: int = 0
    """Seconds since 1970, as is..."""
    revoked_at: int | None = None


class Keys:
    """A file of keys. Any thread may use it, and several processes: each ``verify`` reads the
    file, so a revoked key is refused from then on."""

    def __init__(self, path: Path | str) -> None:
        self._connection = open_database(path, APPLICATION_ID, SCHEMA)
        self._lock = threading.Lock()
        (self._salt_secret,) = self._connection.execute("SELECT secret FROM salt_secret").fetchone()

    def create(
        self,
        name: str,
        *,
        tenant: str | None = None,
        sharing_group: str | None = None,
        max_concurrency: int | None = None,
        requests_per_min: int | None = None,
        tokens_per_min: int | None = None,
        weight: int = 1,
    ) -> tuple[Key, str]:
        """Make a key. The text that callers send is returned this once and not kept. Without
        ``tenant`` the key is a tenant of its own."""
        limits = (max_concurrency, requests_per_min, tokens_per_min, weight)
        if not all(limit is None or limit >= 1 for limit in limits):
            raise TaelError("limits and the weight of a key must be at least 1.")
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        key = Key(
            key_id, name, tenant or key_id, sharing_group, *limits, created_at=int(time.time())
        )
        with self._lock:
            self._connection.execute(
                f"INSERT INTO keys ({COLUMNS}, secret_hash) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?)",
                (*_fields(key)[:-1], _hash(secret)),
            )
        return key, f"tael_{key_id}_{secret}"

    def verify(self, token: str) -> Key | None:
        """The key of what a caller sent; None if it is none or revoked."""
        match = TOKEN.fullmatch(token)
        if match is None:
            return None
        key_id, secret = match.groups()
        with self._lock:
            row = self._connection.execute(
                f"SELECT secret_hash, {COLUMNS} FROM keys WHERE key_id = ? AND revoked_at IS NULL",
                (key_id,),
            ).fetchone()
        # An id that does not exist takes the same way as a wrong secret.
        expected, *fields = row or (bytes(32),)
        return Key(*fields) if hmac.compare_digest(_hash(secret), expected) else None

    def list(self) -> list[Key]:
        """All keys ever made, oldest first."""
        with self._lock:
            rows = self._connection.execute(f"SELECT {COLUMNS} FROM keys ORDER BY rowid").fetchall()
        return [Key(*row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """Refuse a key from now on. Raises TaelError if there is none of that id."""
        with self._lock:
            cursor = self._connection.execute(
                "UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE key_id = ?",
                (int(time.time()), key_id),
            )
        if cursor.rowcount == 0:
            raise TaelError(f"there is no key {key_id}; 'tael keys list' shows them.")

    def exist(self) -> bool:
        """Whether a key was ever made. If so, no request goes without one."""
        with self._lock:
            row = self._connection.execute("SELECT 1 FROM keys LIMIT 1").fetchone()
        return row is not None

    def cache_salt(self, key: Key) -> str:
        """The ``cache_salt`` of ``Engine.add_request``: requests find cached prefixes of the same
        salt only. It cannot be guessed from the name of a tenant."""
        kind, name = ("tenant", key.tenant)
        if key.sharing_group is not None:
            kind, name = ("group", key.sharing_group)
        message = f"{kind}\0{name}".encode()
        return hmac.new(self._salt_secret, message, hashlib.sha256).hexdigest()

    def close(self) -> None:
        self._connection.close()


def _fields(key: Key) -> tuple[object, ...]:
    return tuple(getattr(key, name) for name in Key.__slots__)


def _hash(secret: str) -> bytes:
    # A plain hash is enough: 256 random bits can be neither guessed nor looked up.
    return hashlib.sha256(secret.encode()).digest()
