"""The checks of ``llm-comply`` against a server: do its answers look as the specifications say?

    python -m benchmarks.compliance [--model qwen2.5-coder:0.5b]

Every check of its OpenAI and Anthropic formats is run but those with images: the server takes text.
``llm-comply`` itself skips those of reasoning for models that have none. Results go to
``benchmarks/results/compliance.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llm_comply
from llm_comply.config import ComplianceConfig
from llm_comply.result import TestResult, TestStatus
from llm_comply.runner import TestRunner
from llm_comply.schema import SpecLoader
from llm_comply.test_case import TestCategory
from llm_comply.tests import get_tests

from benchmarks import machine
from benchmarks.serving import NAME, serving
from tael.errors import TaelError
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "compliance.json"
SPECS = {
    "openai-chat": "openai_chat.json",
    "open-responses": "openresponses.json",
    "anthropic": "anthropic.json",
}


def checked(
    url: str,
    model: str,
    form: str,
    *,
    skipped: Collection[TestCategory] = (TestCategory.MULTIMODAL,),
    ignored: Sequence[str] = (),
) -> list[TestResult]:
    """What the checks of one format found, without errors that have one of ``ignored`` in them."""
    config = ComplianceConfig(
        f"{url}/v1", api_key="none", model=model, timeout=300, ignore_errors=list(ignored)
    )
    checks = [test for test in get_tests(form) if test.category not in skipped]
    spec = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / SPECS[form]))
    results: list[TestResult] = TestRunner(config, checks, spec).run_all().results
    return results


def rendered(result: TestResult) -> dict[str, Any]:
    found = {"errors": result.errors, "warnings": result.warnings}
    return {"status": result.status.value} | {name: text for name, text in found.items() if text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    args = parser.parse_args()
    with serving(resolve(args.model), "--context", "4096", "--memory", "2GiB") as server:
        results = {form: checked(server.url, NAME, form) for form in SPECS}
    report = {
        **machine.stamp(),
        "llm-comply": version("llm-comply"),
        "model": args.model,
        "results": {
            form: {result.id: rendered(result) for result in found}
            for form, found in results.items()
        },
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    failed = [
        f"{form} {result.id}: {'; '.join(result.errors)}"
        for form, found in results.items()
        for result in found
        if result.status is TestStatus.FAILED
    ]
    if failed:
        raise TaelError("checks have failed.\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
