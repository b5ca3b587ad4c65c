"""A tiny random Llama over bytes, for what needs some model and not a good one."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tael import SamplingParams
from tael.engine.engine import Engine

MAX_LEN = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = [
    "Once upon a time",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "1 2 3 4",
    "naïve café 漢字 🙂",
]


def save_byte_llama(path: Path, head_dim: int = 8) -> None:
    """A random Llama with a byte-level tokenizer. Ids 0 to 255 are bytes, 256 ends a text. The
    native kernels need heads of 16."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(alphabet) + 1,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=MAX_LEN,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=256,
        )
    )
    model.save_pretrained(path)


def assert_idle(engine: Engine) -> None:
    assert not engine.has_unfinished()
    assert not engine.scheduler.has_unfinished()
    assert engine.manager.num_referenced == 0
    assert not engine._completions and not engine._forks
    assert engine.scheduler.drafter is not None and not engine.scheduler.drafter._histories
    engine.manager.check()
