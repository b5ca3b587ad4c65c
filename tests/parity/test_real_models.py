"""Greedy answers of real files are those of transformers in float32 on the dequantised weights.

Tael answers 24 prompts with 64 tokens each, greedily. Transformers then reads prompt and answer
at once and says what it would have put at every place: the same token, or one whose logit is
closer to it than EPSILON. So every divergence is at a near-tie, and the places after one are
checked as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tael import LLM, SamplingParams

NUM_TOKENS = 64
EPSILON = {"smollm2:135m": 1.25, "qwen2.5-coder:0.5b": 0.5}
"""Of a logit, for the worst of 1,536 places. Activations in int8 move logits by about a tenth, and
by more where a prediction hangs on little; half of the divergences are below 0.06."""
TYPICAL = {"smollm2:135m": 0.35, "qwen2.5-coder:0.5b": 0.2}
"""The same for all but two places in a thousand."""
MIN_SAME = {"smollm2:135m": 0.97, "qwen2.5-coder:0.5b": 0.98}
"""Share of places with the very same token."""

QUESTIONS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
    "List three uses of a hash table.",
    "Translate 'good morning' into Spanish, French and German.",
    "What is the difference between a list and a tuple in Python?",
    "Write a haiku about the sea.",
    "How many legs do two spiders have together?",
    "Name the planets of the solar system in order.",
    "What does HTTP status 404 mean?",
    "Write a SQL query that counts the rows of table users.",
    "Give me a recipe for pancakes.",
]
TEXTS = [
    "The history of the Roman Empire begins",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "import numpy as np\n\n# Compute the mean of every column\n",
    "The three laws of thermodynamics are",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "La révolution française de 1789",
    "Question: What is 12 times 12?\nAnswer:",
    "#include <stdio.h>\n\nint main(void) {\n",
    "In conclusion, the evidence suggests that",
    "<html>\n<head>\n<title>",
    "A monoid is a set with an associative operation and",
]


@pytest.mark.parametrize("name", EPSILON)
def test_greedy_tokens(name: str, model_path: Callable[[str], Path]) -> None:
    path = model_path(name)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(path), max_model_len=1024) as llm:
        prompts = [llm.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
        prompts += [llm.encode(text) for text in TEXTS]
        outputs = llm.generate(prompts, params)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    gaps = np.concatenate(
        [
            logit_gaps(reference, prompt, output.outputs[0].token_ids)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
    )
    assert gaps.shape == (24 * NUM_TOKENS,)
    report = {
        "model": name,
        "same": float((gaps == 0).mean()),
        "largest_gap": float(gaps.max()),
        "p99.8": float(np.quantile(gaps, 0.998)),
    }
    print(json.dumps(report))
    assert gaps.max() < EPSILON[name]
    assert np.quantile(gaps, 0.998) < TYPICAL[name]
    assert (gaps == 0).mean() > MIN_SAME[name]


def logit_gaps(
    model: torch.nn.Module, prompt: list[int], answer: tuple[int, ...]
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """[len(answer)]: how far the model's logit of each token is below its largest."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].numpy()
    chosen = np.take_along_axis(logits, np.array(answer)[:, None], 1)[:, 0]
    return logits.max(1) - chosen
