"""lm-eval through the server: a task of log-likelihoods and one of generations.

    pip install 'tael[harness]'
    python -m benchmarks.harness [--model qwen2.5-coder:0.5b]

The tasks are those in ``benchmarks/harness_tasks``, a few samples each, so nothing is fetched. What
matters is not the score but that every log-likelihood and every text that lm-eval was given is
what the engine itself gives for these tokens, to the last bit. Results go to
``benchmarks/results/harness.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.serving import NAME, serving
from tael import LLM, SamplingParams
from tael.errors import TaelError
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "harness.json"
TASKS = Path(__file__).with_name("harness_tasks")
OPTIONS = ("--context", "2048", "--memory", "2GiB")


@dataclass(frozen=True)
class Checked:
    """The samples of a task beside what the engine says."""

    samples: int
    worst: float
    """Difference of log-likelihoods, or share of texts that differ."""


def evaluated(url: str, tokenizer: Path) -> dict[str, Any]:
    """What lm-eval reports, with its samples."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    import lm_eval
    from lm_eval.tasks import TaskManager

    report: dict[str, Any] = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": NAME,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tokenizer),
            "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=["tael_choice", "tael_generate"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return report


def save_tokenizer(llm: LLM, folder: Path) -> None:
    """As transformers reads it."""
    tokenizer = llm.engine.tokenizer
    tokenizer.save(folder)
    end = tokenizer.decode([min(tokenizer.eos_token_ids)], skip_special_tokens=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def check_choices(samples: list[dict[str, Any]], llm: LLM) -> Checked:
    """Log-likelihoods of answers after questions."""
    worst, count = 0.0, 0
    for sample in samples:
        for request, response in zip(sample["arguments"], sample["resps"], strict=True):
            context, answer = request
            whole = llm.encode(context + answer)
            num_answer = len(whole) - len(llm.encode(context))
            params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
            (output,) = llm.generate([whole], params)
            own = sum(entry.logprob for entry in output.prompt_logprobs[-num_answer:])
            worst = max(worst, abs(own - float(response[0][0])))
            count += 1
    return Checked(count, worst)


def check_texts(samples: list[dict[str, Any]], llm: LLM) -> Checked:
    """Greedy continuations up to a stop string."""
    num_different = 0
    for sample in samples:
        ((context, arguments),) = sample["arguments"]
        params = SamplingParams(
            max_tokens=arguments["max_gen_toks"], temperature=0, stop=arguments["until"]
        )
        (output,) = llm.generate([context], params)
        num_different += output.text != sample["resps"][0][0]
    return Checked(len(samples), num_different / len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    args = parser.parse_args()
    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as folder:
        with LLM(str(model), max_model_len=2048, memory=2 << 30) as llm:
            save_tokenizer(llm, Path(folder))
        with serving(model, *OPTIONS) as server:
            report = evaluated(server.url, Path(folder))
    samples = report["samples"]
    with LLM(str(model), max_model_len=2048, memory=2 << 30) as llm:
        choices = check_choices(samples["tael_choice"], llm)
        texts = check_texts(samples["tael_generate"], llm)
    result = {
        **machine.stamp(),
        "lm-eval": version("lm-eval"),
        "model": args.model,
        "log_likelihood": {
            "accuracy": report["results"]["tael_choice"]["acc,none"],
            "requests": choices.samples,
            "worst_difference_from_engine": choices.worst,
        },
        "generation": {
            "exact_match": report["results"]["tael_generate"]["exact_match,stripped"],
            "requests": texts.samples,
            "share_different_from_engine": texts.worst,
        },
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if choices.worst or texts.worst:
        raise TaelError("what lm-eval was given is not what the engine gives.")


if __name__ == "__main__":
    main()
