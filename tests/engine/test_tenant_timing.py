"""Time to the first token tells no tenant what another one has asked.

Measured in steps, which are the same every time; ``benchmarks/cache_timing.py`` uses a clock.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_llama import save_byte_llama
from disk_engines import PARAMS, make_engine

from tael.economics.keys import Keys
from tael.engine.engine import Engine
from tael.loader.prepared import PreparedModel, load_prepared

SECRET = [7, 1, 9] * 60
COLD_STEPS = 3
"""180 tokens by 64."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    path = tmp_path_factory.mktemp("model")
    save_byte_llama(path, head_dim=16)
    return load_prepared(path)


def steps_to_first_token(engine: Engine, salt: str) -> int:
    engine.add_request("x", SECRET, PARAMS, cache_salt=salt)
    num_steps = 1
    while not any(delta.token_ids for delta in engine.step()):
        num_steps += 1
    while engine.has_unfinished():
        engine.step()
    return num_steps


@pytest.mark.parametrize(
    ("owner", "prober", "num_steps"),
    [
        (("a", "tenant", None), ("b", "tenant", None), 1),  # positive control
        (("a", "one", None), ("b", "another", None), COLD_STEPS),
        (("a", "one", "group"), ("b", "another", "group"), 1),  # they opted in
        (("a", "one", "group"), ("b", "another", None), COLD_STEPS),
        (("a", "one", "group"), ("b", "group", None), COLD_STEPS),  # a tenant named as the group
    ],
)
def test_probe(
    model: PreparedModel,
    tmp_path: Path,
    owner: tuple[str, str, str | None],
    prober: tuple[str, str, str | None],
    num_steps: int,
) -> None:
    keys = Keys(tmp_path / "keys.sqlite")
    engine = make_engine(model, None)
    salts = [
        keys.cache_salt(keys.create(name, tenant=tenant, sharing_group=group)[0])
        for name, tenant, group in (owner, prober)
    ]
    assert steps_to_first_token(engine, salts[0]) == COLD_STEPS
    assert steps_to_first_token(engine, salts[1]) == num_steps
    keys.close()
    engine.close()
