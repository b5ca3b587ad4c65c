"""The official client of OpenAI for Node drives every endpoint, streaming and not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, Running, eventually

from tael import LLM, SamplingParams

FOLDER = Path(__file__).parent / "node"
NODE = shutil.which("node")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Say hi"}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOLS = [{"name": "weather", "parameters": SCHEMA}]

pytestmark = pytest.mark.skipif(
    NODE is None or not (FOLDER / "node_modules").exists(),
    reason="needs node, and 'npm ci --prefix tests/server/node'",
)

Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(shared_server: Running) -> Results:
    """What the client was given, by the names in drive.js."""
    assert NODE is not None
    settings = {
        "baseURL": f"{shared_server.url}/v1",
        "model": MODEL,
        "messages": [SYSTEM, USER],
        "schema": SCHEMA,
        "tools": TOOLS,
    }
    process = subprocess.run(
        [NODE, "drive.js"],
        cwd=FOLDER,
        env={**os.environ, "TAEL_CLIENT_TEST": json.dumps(settings)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    results: Results = json.loads(process.stdout)
    eventually(shared_server.is_idle)
    return results


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **params)


def test_models(results: Results) -> None:
    assert results["models"] == [MODEL] and results["model"]["id"] == MODEL


def test_chat(results: Results, llm: LLM) -> None:
    expected = llm.chat([SYSTEM, USER], greedy(max_tokens=12, n=2, logprobs=2))
    answer = results["chat"]
    assert [c["message"]["content"] for c in answer["choices"]] == [
        output.text for output in expected.outputs
    ]
    for choice, output in zip(answer["choices"], expected.outputs, strict=True):
        found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert found == pytest.approx([entry.logprob for entry in output.logprobs])
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_chat_stream(results: Results, llm: LLM) -> None:
    expected = llm.chat([SYSTEM, USER], greedy(max_tokens=12))
    *chunks, last = results["chatStream"]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == expected.text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert results["chatHelper"]["choices"][0]["message"]["content"] == expected.text


def test_chat_schema(results: Results) -> None:
    whole = results["chatSchema"]["choices"][0]["message"]["content"]
    chunks = results["chatSchemaStream"]
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == whole and json.loads(whole)["ok"] in (True, False)


def test_chat_tools(results: Results) -> None:
    (choice,) = results["chatTools"]["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["ok"] in (True, False)
    deltas = [chunk["choices"][0]["delta"] for chunk in results["chatToolsStream"]]
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert streamed["function"] == call["function"]


def test_text(results: Results, llm: LLM) -> None:
    (expected,) = llm.generate("abc", greedy(max_tokens=8, logprobs=2))
    (choice,) = results["text"]["choices"]
    assert choice["text"] == "abc" + expected.text
    logprobs = choice["logprobs"]["token_logprobs"]
    assert logprobs[0] is None and len(logprobs) == 3 + 8
    assert logprobs[3:] == pytest.approx([e.logprob for e in expected.outputs[0].logprobs])
    *chunks, last = results["textStream"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert last["usage"]["completion_tokens"] == 8
    of_ids = llm.generate([[1, 2, 3], [4, 5]], greedy(max_tokens=4))
    assert [c["text"] for c in results["textIds"]["choices"]] == [r.text for r in of_ids]


def test_responses(results: Results, llm: LLM) -> None:
    expected = llm.chat([SYSTEM, USER], greedy(max_tokens=12)).text
    assert results["responses"]["output_text"] == expected
    events = results["responsesStream"]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == llm.chat([USER], greedy(max_tokens=12)).text
    assert events[-1]["type"] == "response.incomplete"
    assert json.loads(results["responsesSchema"]["output_text"])["ok"] in (True, False)


def test_responses_tools(results: Results) -> None:
    (call,) = results["responsesTools"]["output"]
    assert call["type"] == "function_call" and call["name"] == "weather"
    assert json.loads(call["arguments"])["ok"] in (True, False)
    (streamed,) = results["responsesToolsStream"]["output"]
    assert streamed["arguments"] == call["arguments"] and streamed["call_id"] != call["call_id"]


@pytest.mark.parametrize(
    ("name", "kind", "code", "param"),
    [
        ("noModel", "NotFoundError", "model_not_found", "model"),
        ("noMessages", "BadRequestError", "invalid_value", "messages"),
        ("unknownParameter", "BadRequestError", "unsupported_parameter", "reasoning"),
        ("tooLong", "BadRequestError", "context_length_exceeded", None),
        ("embeddings", "NotFoundError", "unsupported_endpoint", None),
    ],
)
def test_errors(results: Results, name: str, kind: str, code: str, param: str | None) -> None:
    error = results[name]
    assert (error["name"], error["code"], error["param"]) == (kind, code, param)
    assert error["type"] == "invalid_request_error"


def test_a_stopped_stream_frees_its_blocks(results: Results) -> None:
    assert results["stopped"]  # the fixture has seen the server idle after it
