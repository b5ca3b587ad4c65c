"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tael.backends.base import Backend
from tael.cache.manager import CacheManager
from tael.config import BLOCK_SIZE, EngineConfig
from tael.engine.output import OutputProcessor
from tael.engine.runner import StepResult, run_step
from tael.engine.sampler import Sampler
from tael.engine.scheduler import ScheduledRequest, Scheduler
from tael.errors import TaelError
from tael.loader.tokenizer import Tokenizer
from tael.memory.budget import available_memory_bytes, format_bytes, kv_budget, plan_pools
from tael.memory.kv_store import KVStore
from tael.memory.process import rss_bytes
from tael.models.spec import ModelSpec, cache_groups
from tael.request import FinishReason, Request, SamplingParams, TokenLogprobs, Usage

logger = logging.getLogger(__name__)
