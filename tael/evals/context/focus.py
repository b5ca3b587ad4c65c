"""Which layers are to read more of a context than the others.

What sparse reading loses, it loses in few layers: in Qwen2.5-Coder 0.5B in the 10th and the 12th of
24, whose heads fetch what the question asks for. So each layer is given more in turn, at the cost
of the others, and it is measured how much more likely the right answers become.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from tael.config import BLOCK_SIZE, MIN_BUDGET_BLOCKS, EngineConfig
from tael.evals.context.cell import answer_log_likelihoods
from tael.evals.context.suite import Samples
from tael.llm import open_engine
from tael.loader.prepared import load_prepared

ONE_OF = 12
"""So few layers are chosen at most: what they read more, the others read less."""
LEAST_GAIN = 0.1
"""Of what is lost without."""


def find_focus(
    path: Path,
    config: EngineConfig,
    samples: Samples,
    show: Callable[[str, float], None],
) -> tuple[int, ...]:
    """``kv_focus`` for a model. ``config`` is of the exact mode and has the length of the samples
    as its context, of which a fourth is read. ``show`` is told what every layer gains: nats of a
    token of the right answers."""
    full = [i for i, s in enumerate(load_prepared(path).spec.layers) if s.mixer.window is None]
    if len(full) < ONE_OF:
        return ()
    assert config.max_model_len is not None
    budget = max(MIN_BUDGET_BLOCKS * BLOCK_SIZE, config.max_model_len // 4)
    sparse = replace(config, kv_budget=budget, prefill_budget=budget)
    base = _log_likelihood(path, sparse, samples)
    gains: dict[int, float] = {}
    for layer in full:
        focused = replace(sparse, kv_focus=(layer,))
        gains[layer] = _log_likelihood(path, focused, samples) - base
        show(f"layer {layer}", gains[layer])
    lost = _log_likelihood(path, config, samples) - base
    show("all that is lost", lost)
    return best_layers(gains, lost, len(full) // ONE_OF)


def best_layers(gains: Mapping[int, float], lost: float, most: int) -> tuple[int, ...]:
    """Those that gain a fair part of what is ``lost``, at most ``most``, ascending."""
    worth = [layer for layer, gain in gains.items() if gain > max(0.0, LEAST_GAIN * lost)]
    return tuple(sorted(sorted(worth, key=lambda layer: -gains[layer])[:most]))


def _log_likelihood(path: Path, config: EngineConfig, samples: Samples) -> float:
    """Mean over the tasks."""
    engine = open_engine(str(path), config)
    try:
        found = answer_log_likelihoods(engine, samples)
    finally:
        engine.close()
    return fmean(fmean(mean for of in answers for mean in of) for answers in found.values())
