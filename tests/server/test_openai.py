"""The official client of OpenAI drives every endpoint, streaming and not."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from byte_llama import PROMPTS
from openai import OpenAI
from pydantic import BaseModel
from running import MODEL, Running

from tael import LLM, SamplingParams

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]},
]
PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi"}]


@pytest.fixture
def client(server: Running) -> OpenAI:
    return server.openai()


def test_chat(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(PLAIN, SamplingParams(seed=3, max_tokens=20, n=3, stop=["e"]))
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=3, max_completion_tokens=20, n=3, stop="e"
    )
    assert [c.message.content for c in answer.choices] == [o.text for o in expected.outputs]
    reasons = [c.finish_reason for c in answer.choices]
    assert reasons == [o.finish_reason.value for o in expected.outputs]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == expected.usage.num_output_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == MODEL and answer.id.startswith("chatcmpl-")


def test_chat_stream(client: OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, n=2)
    expected = llm.chat(PLAIN, params)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_tokens=20,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *chunks, last = chunks
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [output.text for output in expected.outputs]
    assert reasons == ["length", "length"]
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == 40


def test_a_stream_without_usage_has_none(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=3, stream=True
    )
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: OpenAI, llm: LLM, stream: bool) -> None:
    expected = llm.chat(PLAIN, SamplingParams(temperature=0, max_tokens=6, logprobs=2)).outputs[0]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    entries = []
    for part in answer if stream else [answer]:
        for choice in part.choices:
            entries += choice.logprobs.content if choice.logprobs else []
    assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in expected.logprobs])
    assert (
        b"".join(bytes(e.bytes) for e in entries)
        == llm.engine.tokenizer.decode(expected.token_ids).encode()[: len(entries)]
        or len(entries) == 6
    )
    assert all(len(e.top_logprobs) == 2 for e in entries)
    assert entries[0].top_logprobs[0].token == entries[0].token


def test_sampling_parameters_reach_the_engine(client: OpenAI) -> None:
    def text(**parameters: Any) -> str:
        completion = client.completions.create(
            model=MODEL, prompt="abc", max_tokens=8, temperature=0, **parameters
        )
        return completion.choices[0].text

    assert text(logit_bias={str(ord("z") - ord("!")): 100}) == "z" * 8
    assert text(logit_bias={"7": 50}, frequency_penalty=2) == text(logit_bias={"7": 50})
    biased = {"7": 1.0, "8": 0.5}
    assert text(logit_bias=biased, presence_penalty=2) != text(
        logit_bias=biased, presence_penalty=-2
    )
    other = text(extra_body={"repetition_penalty": 50.0})
    assert len(set(other)) > 1 and other != text()


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_many_prompts(client: OpenAI, llm: LLM, stream: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, n=2)
    expected = [o.text for result in llm.generate(PROMPTS, params) for o in result.outputs]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS, temperature=0, max_tokens=10, n=2, stream=stream
    )
    texts = [""] * len(expected)
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_completions_of_token_ids(client: OpenAI, llm: LLM) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    expected = [result.text for result in llm.generate(prompts, SamplingParams(0x10, 0))]
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None and answer.usage.prompt_tokens == 5
    single = client.completions.create(model=MODEL, prompt=prompts[1], temperature=0)
    assert single.choices[0].text == expected[1]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "cd"], echo=True, max_tokens=2, temperature=0, stream=stream
    )
    texts = ["", ""]
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert [text[:2] for text in texts] == ["ab", "cd"] and len(texts[0]) > 2


def test_completion_logprobs(client: OpenAI, llm: LLM) -> None:
    expected = llm.generate("abc", SamplingParams(temperature=0, max_tokens=5, logprobs=3))
    answer = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, max_tokens=5, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    found = [entry.logprob for entry in expected[0].outputs[0].logprobs]
    assert logprobs.token_logprobs == pytest.approx(found)
    assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
    assert logprobs.top_logprobs is not None and 1 <= len(logprobs.top_logprobs[0]) <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_log_likelihood(client: OpenAI, llm: LLM, stream: bool) -> None:
    """As lm-eval asks for it: token ids, echoed, with the log-probabilities of all of them."""
    prompts = [llm.encode(text) for text in PROMPTS]
    expected = llm.generate(
        prompts, SamplingParams(max_tokens=1, logprobs=1, prompt_logprobs=1, temperature=0)
    )
    for _ in range(2):  # the second time, the prefix cache has them
        answer = client.completions.create(
            model=MODEL,
            prompt=prompts,
            max_tokens=1,
            temperature=0,
            logprobs=1,
            echo=True,
            stream=stream,
        )
        found: list[list[float | None]] = [[] for _ in prompts]
        tops: list[list[Any]] = [[] for _ in prompts]
        for part in answer if stream else [answer]:
            for choice in part.choices:
                found[choice.index] += choice.logprobs.token_logprobs
                tops[choice.index] += choice.logprobs.top_logprobs
        for result, logprobs, top, prompt in zip(expected, found, tops, prompts, strict=True):
            assert len(logprobs) == len(top) == len(prompt) + 1
            assert logprobs[0] is None and top[0] is None
            wanted = [*result.prompt_logprobs, *result.outputs[0].logprobs]
            assert logprobs[1:] == pytest.approx([entry.logprob for entry in wanted], abs=1e-4)
            assert all(
                max(entry.values()) >= logprob
                for entry, logprob in zip(top[1:], logprobs[1:], strict=True)
            )


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tael"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: OpenAI, stream: bool, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=temperature,
        seed=1,
        stream=stream,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
        },
    )
    if stream:
        text = "".join(part.choices[0].delta.content or "" for part in answer)
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    value = json.loads(text)
    assert value["size"] in ("small", "large") and value["ok"] in (True, False)


class Answer(BaseModel):
    ok: bool


def test_the_helpers_of_the_client(client: OpenAI) -> None:
    """They add parameters of their own, and check what comes more closely."""
    chat = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Answer)
    assert chat.choices[0].message.parsed is not None
    response = client.responses.parse(model=MODEL, input="hi", text_format=Answer)
    assert response.output_parsed is not None
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Answer
    ) as events:
        text = "".join(event.delta for event in events if event.type == "content.delta")
        message = events.get_final_completion().choices[0].message
    assert message.content == text and message.parsed is not None


def test_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, response_format={"type": "json_object"}, n=2
    )
    assert all((choice.message.content or "").startswith("{") for choice in answer.choices)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"unit": {"$ref": "#/$defs/unit"}},
                "required": ["unit"],
                "additionalProperties": False,
                "$defs": {"unit": {"enum": [f"{name}-1", f"{name}-2"]}},
            },
        },
    }
    for name in ("weather", "news")
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "news"])
def test_tools(client: OpenAI, stream: bool, choice: str) -> None:
    tool_choice: Any = choice
    if choice == "news":
        tool_choice = {"type": "function", "function": {"name": "news"}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=tool_choice,
        temperature=0,
        stream=stream,
    )
    calls, reasons = [], []
    for part in answer if stream else [answer]:
        (piece,) = part.choices
        message = piece.delta if stream else piece.message
        assert not message.content
        calls += message.tool_calls or []
        reasons.append(piece.finish_reason)
    (call,) = calls
    assert reasons[-1] == "tool_calls"
    assert choice in ("required", call.function.name)
    assert json.loads(call.function.arguments)["unit"].startswith(call.function.name)
    follow_up = client.chat.completions.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"})]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        tools=TOOLS,
        max_tokens=2,
    )
    assert follow_up.usage is not None and follow_up.usage.completion_tokens <= 2


def test_responses(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(PLAIN, SamplingParams(temperature=0, max_tokens=12))
    answer = client.responses.create(
        model=MODEL,
        instructions="Be brief.",
        input="Say hi",
        temperature=0,
        max_output_tokens=12,
    )
    assert answer.output_text == expected.text
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 12
    again = client.responses.create(
        model=MODEL,
        input=[*PLAIN, *[item.model_dump() for item in answer.output], *PLAIN[1:]],  # type: ignore[list-item]
        max_output_tokens=3,
    )
    assert again.usage is not None and again.usage.input_tokens > answer.usage.input_tokens


def test_responses_stream(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(PLAIN, SamplingParams(temperature=0, max_tokens=12))
    with client.responses.stream(
        model=MODEL,
        instructions="Be brief.",
        input="Say hi",
        temperature=0,
        max_output_tokens=12,
    ) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.text
    assert events[-1].response.output_text == expected.text


def test_responses_json(client: OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input="hi",
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    )
    assert answer.status == "completed" and "size" in json.loads(answer.output_text)


FLAT_TOOLS: list[Any] = [{"type": "function", "strict": None, **t["function"]} for t in TOOLS]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "news"])
def test_responses_tools(client: OpenAI, stream: bool, choice: str) -> None:
    parameters: dict[str, Any] = {
        "model": MODEL,
        "input": [{"role": "user", "content": "Say hi"}],
        "tools": FLAT_TOOLS,
        "tool_choice": {"type": "function", "name": "news"} if choice == "news" else choice,
        "temperature": 0,
    }
    if stream:
        with client.responses.stream(**parameters) as events:
            kinds = [event.type for event in events]
            answer = events.get_final_response()
        assert kinds[2:-1] == [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
        ]
    else:
        answer = client.responses.create(**parameters)
    assert answer.status == "completed"
    (call,) = answer.output
    assert call.type == "function_call" and choice in ("required", call.name)
    assert json.loads(call.arguments)["unit"].startswith(call.name)
    follow_up = client.responses.create(
        model=MODEL,
        input=[
            *parameters["input"],
            call.model_dump(exclude_none=True),  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ],
        tools=FLAT_TOOLS,
        max_output_tokens=2,
    )
    assert follow_up.usage is not None and follow_up.usage.output_tokens <= 2


def test_calls_reach_the_template_as_those_of_a_chat(client: OpenAI) -> None:
    """The same conversation in both dialects has as many tokens."""
    call = {"name": "news", "arguments": '{"unit": "news-1"}'}
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "tool_calls": [{"id": "c", "type": "function", "function": call}],  # type: ignore[list-item]
            },
            {"role": "tool", "tool_call_id": "c", "content": "d"},
        ],
        max_tokens=1,
        tools=TOOLS,
    )
    response = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"type": "function_call", "call_id": "c", **call},  # type: ignore[list-item]
            {"type": "function_call_output", "call_id": "c", "output": "d"},
        ],
        max_output_tokens=1,
        tools=FLAT_TOOLS,
    )
    assert chat.usage is not None and response.usage is not None
    assert chat.usage.prompt_tokens == response.usage.input_tokens


def test_embeddings_are_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings") as caught:
        client.embeddings.create(model=MODEL, input="abc")
    assert caught.value.code == "unsupported_endpoint"
    assert caught.value.type == "invalid_request_error"


def test_tokenize(server: Running, llm: LLM) -> None:
    with server.http() as http:
        answer = http.post("/tokenize", json={"prompt": "abc", "return_token_strs": True}).json()
        assert answer["tokens"] == llm.encode("abc") and answer["count"] == 3
        assert answer["token_strs"] == ["a", "b", "c"]
        answer = http.post("/tokenize", json={"messages": PLAIN}).json()
        assert answer["tokens"] == llm.encode(PLAIN)


def test_metrics(client: OpenAI, server: Running) -> None:
    def value(name: str) -> float:
        with server.http() as http:
            lines = http.get("/metrics").text.splitlines()
        (line,) = [line for line in lines if line.split(" ")[0] == name]
        return float(line.split(" ")[1])

    before = value("tael_generation_tokens_total")
    num_requests = value('tael_requests_total{outcome="finished"}')
    client.completions.create(
        model=MODEL, prompt="abc", max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert value("tael_generation_tokens_total") == before + 7
    assert value('tael_requests_total{outcome="finished"}') == num_requests + 1
    assert value("tael_engine_up") == 1
