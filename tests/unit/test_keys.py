"""Keys: hashed at rest, refused once revoked; tenants do not share a salt."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from tael.economics.keys import Key, Keys
from tael.errors import TaelError


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.sqlite")


def test_a_key_opens_until_it_is_revoked(keys: Keys) -> None:
    assert not keys.exist()
    key, token = keys.create("ann", tenant="acme", max_concurrency=2, tokens_per_min=9, weight=3)
    assert keys.exist()
    assert keys.verify(token) == key == keys.list()[0]
    assert (key.name, key.tenant, key.max_concurrency, key.weight) == ("ann", "acme", 2, 3)
    assert (key.requests_per_min, key.tokens_per_min, key.revoked_at) == (None, 9, None)
    keys.revoke(key.key_id)
    assert keys.verify(token) is None
    assert keys.exist(), "the last key that is revoked does not open the door"
    (revoked,) = keys.list()
    assert revoked.revoked_at is not None
    keys.revoke(key.key_id)
    assert keys.list() == [revoked]


def test_what_is_no_key_does_not_open(keys: Keys) -> None:
    (ann, ann_token), (_, bob_token) = keys.create("ann"), keys.create("bob")
    mixed = f"tael_{ann.key_id}_{bob_token.rpartition('_')[2]}"
    wrong = ["", "tael_", f"tael_{ann.key_id}", f"tael_{ann.key_id}_", mixed, ann_token[:-1]]
    wrong += [ann_token + "0", ann_token.upper(), " " + ann_token, "x" + ann_token, "\udce9", "é"]
    wrong += [f"tael_' OR 1=1 --_{ann_token}", "tael__", "tael_\udce9_x", "_".join(["tael"] * 1000)]
    assert [keys.verify(token) for token in wrong] == [None] * len(wrong)


def test_the_file_does_not_hold_the_secret_and_is_the_owners(keys: Keys, tmp_path: Path) -> None:
    _, token = keys.create("ann")
    secret = token.rpartition("_")[2]
    assert len(bytes.fromhex(secret)) == 32
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        content = path.read_bytes()
        assert secret.encode() not in content and bytes.fromhex(secret) not in content


def test_another_process_sees_at_once(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "keys.sqlite")
    key, token = other.create("ann")
    assert keys.verify(token) == key
    other.revoke(key.key_id)
    assert keys.verify(token) is None


def test_any_thread_may_ask(keys: Keys) -> None:
    tokens = [keys.create(str(i))[1] for i in range(8)]
    names: list[str] = []

    def ask(token: str) -> None:
        for _ in range(50):
            key = keys.verify(token)
            assert key is not None
            names.append(key.name)

    threads = [threading.Thread(target=ask, args=(token,)) for token in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == sorted(str(i) for i in range(8) for _ in range(50))


def test_only_a_tenant_or_a_group_shares_a_salt(keys: Keys, tmp_path: Path) -> None:
    salts = {
        name: keys.cache_salt(Key("id", name, tenant=tenant, sharing_group=group))
        for name, tenant, group in (
            ("a", "acme", None),
            ("b", "acme", None),
            ("c", "other", None),
            ("d", "acme", "law"),
            ("e", "other", "law"),
            ("f", "law", None),
        )
    }
    assert salts["a"] == salts["b"] and salts["d"] == salts["e"]
    assert len(set(salts.values())) == 4, "a group is not the tenant of that name"
    assert keys.cache_salt(keys.create("x")[0]) != keys.cache_salt(keys.create("x")[0])

    again = Keys(tmp_path / "keys.sqlite")
    ann = Key("id", "a", tenant="acme")
    assert again.cache_salt(ann) == salts["a"], "cached prefixes outlive a restart"
    elsewhere = Keys(tmp_path / "elsewhere.sqlite")
    assert elsewhere.cache_salt(ann) != salts["a"], "and cannot be computed elsewhere"


def test_user_errors(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(TaelError, match="no key nobody"):
        keys.revoke("nobody")
    with pytest.raises(TaelError, match="at least 1"):
        keys.create("ann", weight=0)
    junk = tmp_path / "junk"
    junk.write_bytes(b"not a database at all, but long enough to be taken for one" * 99)
    with pytest.raises(TaelError, match=r"cannot use .*junk"):
        Keys(junk)
    with pytest.raises(TaelError, match="cannot open"):
        Keys(junk / "below" / "a" / "file")
