"""The order of eviction, against a model of it; and when loading pays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tael.memory.tiers.index import Index
from tael.memory.tiers.policy import LoadPolicy

KEYS = [bytes([i]) for i in range(6)]
operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "touch", "remove", "evict"]),
        st.sampled_from(KEYS),
        st.integers(1, 9),
    )
)


@given(operations)
def test_index(operations: list[tuple[str, bytes, int]]) -> None:
    index, expected = Index(100), list[tuple[bytes, int]]()
    for operation, key, num_bytes in operations:
        known = dict(expected)
        if operation == "evict" and expected:
            key = index.oldest()
            assert key == expected[0][0]
        if operation == "touch" and key in known:
            index.touch(key)
            expected = [e for e in expected if e[0] != key] + [(key, known[key])]
        elif operation == "add":
            index.add(key, num_bytes)
            expected = [e for e in expected if e[0] != key] + [(key, num_bytes)]
        elif operation in ("remove", "evict"):
            index.remove(key)
            expected = [e for e in expected if e[0] != key]
        assert len(index) == len(expected)
        assert index.num_bytes == sum(size for _, size in expected)
        assert all((k in index) == (k in dict(expected)) for k in KEYS)


def test_policy() -> None:
    policy = LoadPolicy()
    assert policy.pays(400_000, 32), "unmeasured: try"
    policy.observe_prefill(512, 1.0)
    policy.observe_load(1_000_000, 1.0)
    assert policy.pays(1_000_000, 600) and not policy.pays(1_000_000, 500)
    policy.observe_load(3_000_000, 1.0)
    assert policy.bytes_per_s > 1_900_000, "half of it is the newest"


def test_policy_tries_a_slow_disk_again() -> None:
    policy = LoadPolicy()
    policy.observe_load(1000, 1.0)
    assert not any(policy.pays(10_000, 1000) for _ in range(50)), "to ask changes nothing"
    for _ in range(50):
        policy.forgive()
    assert policy.pays(10_000, 1000)
    policy.observe_timeout(0, 10.0)
    assert not policy.pays(10_000, 1000)
