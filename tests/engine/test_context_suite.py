"""The effective-context suite on engines: prompts, forced tokens and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_llama import MAX_LEN
from click.testing import CliRunner

from tael import LLM, SamplingParams
from tael.cli.main import main
from tael.config import BLOCK_SIZE
from tael.evals.context import kept, suite
from tael.evals.context.cell import Cell
from tael.evals.context.prompt import INTRODUCTION, PromptFormat
from tael.evals.context.sample import Question
from tael.evals.context.teacher import forced_logprobs

TEXT = list(b"It was the best of times, it was the worst of times. It was the age of wisdom.")
QUESTIONS = [
    Question(f"What is {name}?", ("1234567",), f"{name} is", 0.5) for name in ("amber", "beige")
]


def test_prompts_begin_with_the_haystack(llm: LLM) -> None:
    prompts = PromptFormat(llm.engine.tokenizer)
    prefix = prompts.prefix("Amber is 1234567.")
    asked = [prefix + prompts.suffix(question) for question in QUESTIONS]
    decode = llm.engine.tokenizer.decode
    assert decode(prefix) == f"user: {INTRODUCTION}Amber is 1234567.\n\n"
    assert decode(asked[0][len(prefix) :]) == "Question: What is amber?\nassistant: amber is"
    llm.generate([prefix], SamplingParams(max_tokens=1))
    for output in llm.generate(asked, SamplingParams(max_tokens=1)):
        assert output.usage.num_cached_tokens == len(prefix) // BLOCK_SIZE * BLOCK_SIZE > 0


def test_a_haystack_cannot_say_what_the_template_says(
    model_path: Callable[[str], Path],
) -> None:
    """Names of control tokens in it are text, and a prompt is what the template makes of it."""
    with LLM(str(model_path("smollm2:135m")), max_model_len=512) as llm:
        tokenizer = llm.engine.tokenizer
        prompts = PromptFormat(tokenizer)
        haystack = "One <|im_end|> two <|im_start|> three."
        ids = prompts.prefix(haystack) + prompts.suffix(QUESTIONS[0])
        content = f"{INTRODUCTION}{haystack}\n\nQuestion: {QUESTIONS[0].text}"
        whole = tokenizer.apply_chat_template([{"role": "user", "content": content}])
        lead = tokenizer.encode(QUESTIONS[0].lead, add_special_tokens=False)
        assert tokenizer.decode(ids, False) == tokenizer.decode(whole + lead, False)
        special = [i for i in ids if tokenizer.is_special(i)]
        assert special == [i for i in whole if tokenizer.is_special(i)]


def test_forced_tokens_have_the_log_probabilities_of_their_places(llm: LLM) -> None:
    num_prompt_tokens = len(TEXT) - 5
    rows = forced_logprobs(llm.engine, TEXT, num_prompt_tokens)
    assert rows.shape == (5, llm.engine.spec.vocab_size)
    np.testing.assert_allclose(np.exp(rows, dtype=np.float64).sum(1), 1, rtol=1e-5)
    for i, row in enumerate(rows):
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        output = llm.generate([TEXT[: num_prompt_tokens + i]], params)[0].outputs[0]
        ids, logprobs = zip(*output.logprobs[0].top, strict=True)
        np.testing.assert_allclose(row[list(ids)], logprobs, atol=1e-4)


def test_the_engine_is_as_before_when_a_forced_text_does_not_fit(llm: LLM) -> None:
    backend = llm.engine.backend
    with pytest.raises(Exception, match="tokens"):
        forced_logprobs(llm.engine, [65] * (MAX_LEN + 10), MAX_LEN + 5)
    assert llm.engine.backend is backend


def test_command(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """A mode that changes nothing loses nothing; the same seed gives the same answers."""
    path = model_path("smollm2:135m")
    arguments = ["bench", "context", str(path), "--lengths", "768", "--samples", "2"]
    arguments += ["--questions", "2", "--tasks", "needle_digits,parents", "--texts", "1"]
    arguments += ["--mode", "drafts=speculation:off", "--json", str(tmp_path / "result.json")]
    arguments += ["--plot", str(tmp_path / "plot.png")]
    outcome = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["tasks"]["needle_digits"]
    assert result["modes"]["drafts"]["ec_rel"] in (0, 768)
    exact, drafts = result["cells"]
    assert set(drafts["answers"]) == {task for task, counts in result["tasks"].items() if counts}
    assert exact["answers"].items() >= drafts["answers"].items()
    assert exact["log_likelihoods"] == drafts["log_likelihoods"]
    assert drafts["retention"]["retrieval"]["mean"] == 0 and not result["flips"]
    assert drafts["divergence"]["mean_kld"] == 0 and drafts["divergence"]["num_positions"] == 64
    cost = drafts["cost"]
    assert 0 < cost["kv_bytes"] < cost["peak_rss_bytes"]
    assert cost["s_per_token"] > 0
    assert "EC_rel" in outcome.stdout.splitlines()[0]
    assert (tmp_path / "plot.png").exists()


def test_a_length_beyond_the_model_ends_the_run_with_a_line(
    model_path: Callable[[str], Path],
) -> None:
    arguments = ["bench", "context", str(model_path("smollm2:135m")), "--lengths", "9000"]
    arguments += ["--samples", "1", "--questions", "1", "--tasks", "needle_digits"]
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 2
    assert "9,000 tokens is beyond the 8,192" in outcome.output


def test_a_run_that_was_ended_goes_on(
    model_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    run_isolated = suite._run_isolated

    def counting(job: Any, rows: Path) -> Cell:
        measured.append("exact" if job.is_exact else job.config.kv_format)
        return run_isolated(job, rows)

    monkeypatch.setattr(suite, "_run_isolated", counting)

    def run(*modes: str, seed: int = 0) -> Any:
        json_path = tmp_path / "result.json"
        arguments = ["bench", "context", str(model_path("smollm2:135m")), "--lengths", "768"]
        arguments += ["--samples", "1", "--questions", "2", "--tasks", "needle_digits"]
        arguments += ["--texts", "1", "--seed", str(seed), "--json", str(json_path)]
        arguments += ["--keep", str(tmp_path / "kept")]
        arguments += [word for mode in modes for word in ("--mode", f"{mode}=kv_format:{mode}")]
        outcome = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
        measured.sort()
        return json.loads(json_path.read_text())

    first = run("q8")
    assert measured == ["exact", "q8"]
    measured.clear()
    second = run("q8", "k8v4")
    assert measured == ["k8v4"]
    assert [cell for cell in second["cells"] if cell["mode"] != "k8v4"] == first["cells"]
    # The distributions of the exact mode were kept too.
    assert second["cells"][2]["divergence"]["mean_kld"] > 0
    measured.clear()
    run("q8", seed=1)
    assert measured == ["exact", "q8"]
    measured.clear()
    for path in (tmp_path / "kept").glob("*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    assert run("q8")["cells"][1]["answers"] == first["cells"][1]["answers"]
    assert measured == ["exact", "q8"]
    measured.clear()
    monkeypatch.setattr(kept, "package_digest", lambda: "of another build")
    run("q8")
    assert measured == ["exact", "q8"]
