"""Stop strings, held-back text and the reasons to end, on tokens that are pieces of text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.engine.output import OutputProcessor, StopStrings
from tael.errors import TaelError
from tael.request import FinishReason, Request, SamplingParams

EOS = 1_000_000


class PieceTokenizer:
    """Token i is the i-th piece of UTF-8."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode_stream(self) -> PieceStream:
        return PieceStream(self.pieces)


class PieceStream:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._held = b""

    def step(self, token_id: int) -> str:
        self._held += self._pieces[token_id]
        try:
            text, self._held = self._held.decode(), b""
        except UnicodeDecodeError as error:
            text, self._held = self._held[: error.start].decode(), self._held[error.start :]
        return text

    def flush(self) -> str:
        return self._held.decode(errors="replace")


def run(
    pieces: list[bytes], params: SamplingParams, extra_ids: tuple[int, ...] = ()
) -> tuple[list[str], list[int], FinishReason | None]:
    """Deltas, tokens and the reason of a request that samples the pieces in order."""
    request = Request("r", [0], params, eos_token_ids=frozenset({EOS}))
    limit = 1 + (params.max_tokens or 10_000)
    output = OutputProcessor(request, limit, PieceTokenizer(pieces))  # type: ignore[arg-type]
    deltas = []
    for token_id in (*range(len(pieces)), *extra_ids):
        request.token_ids.append(token_id)
        text, reason = output.append(token_id)
        deltas.append(text)
        if reason is not None:
            return deltas, request.output_token_ids, reason
    return deltas, request.output_token_ids, None


def cut(text: str, stops: list[str]) -> str | None:
    """The definition: ``text`` before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def split(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


texts = st.text(st.sampled_from("abé漢🙂"), max_size=30)
stop_lists = st.lists(st.text(st.sampled_from("abé漢🙂"), min_size=1, max_size=5), max_size=4)


@settings(max_examples=500)
@given(text=texts, stops=stop_lists, data=st.data())
def test_stream_is_the_text_before_the_first_stop_string(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    encoded = text.encode()
    pieces = split(encoded, data.draw(st.lists(st.integers(0, len(encoded)), max_size=40)))
    deltas, token_ids, reason = run(pieces, SamplingParams(stop=stops), (EOS,))
    expected = cut(text, stops)
    assert "".join(deltas) == (text if expected is None else expected)
    assert reason is FinishReason.STOP
    if expected is None:
        assert token_ids == [*range(len(pieces)), EOS]
    else:  # the tokens end with the one that completed the stop string
        last = token_ids[-1]
        assert cut(b"".join(pieces[:last]).decode(errors="ignore"), stops) is None
        assert cut(b"".join(pieces[: last + 1]).decode(errors="ignore"), stops) == expected


@settings(max_examples=200)
@given(text=texts, stops=stop_lists, data=st.data())
def test_only_what_could_become_a_stop_string_is_held_back(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    strings, shown, read = StopStrings(stops), "", ""
    for piece in split(text.encode(), data.draw(st.lists(st.integers(0, 90), max_size=40))):
        read += piece.decode(errors="ignore")
        delta, stopped = strings.push(piece.decode(errors="ignore"))
        shown += delta
        if stopped:
            break
        # No stop string can still be completed that begins in what is shown...
        starts = [n for n in range(len(read)) if any(s.startswith(read[n:]) for s in stops)]
        # ... and nothing else is held back.
        assert len(shown) == min(starts, default=len(read))


def test_stop_string_in_the_middle_of_a_token() -> None:
    deltas, token_ids, reason = run([b"one", b" two\nthree", b"x"], SamplingParams(stop=["\n"]))
    assert deltas == ["one", " two"]
    assert token_ids == [0, 1]
    assert reason is FinishReason.STOP


def test_the_longest_of_the_stop_strings_that_end_together_counts() -> None:
    assert run([b"xabc"], SamplingParams(stop=["c", "abc", "bc"]))[0] == ["x"]


def test_end_of_sequence_and_stop_tokens_have_no_text() -> None:
    pieces = [b"a", b"b", b"c"]
    deltas, token_ids, reason = run(pieces, SamplingParams(stop_token_ids=[1]))
    assert (deltas, token_ids, reason) == (["a", ""], [0, 1], FinishReason.STOP)
    deltas, token_ids, reason = run(pieces, SamplingParams(), (EOS,))
    assert "".join(deltas) == "abc"
    assert (token_ids[-1], reason) == (EOS, FinishReason.STOP)


def test_ignore_eos_goes_on_but_stop_tokens_still_stop() -> None:
    request = Request(
        "r",
        [9],
        SamplingParams(ignore_eos=True, stop_token_ids=[1]),
        eos_token_ids=frozenset({0}),
    )
    tokenizer = PieceTokenizer([b"", b"b"])
    output = OutputProcessor(request, 100, tokenizer)  # type: ignore[arg-type]
    request.token_ids.append(0)
    assert output.append(0) == ("", None)
    request.token_ids.append(1)
    assert output.append(1) == ("", FinishReason.STOP)


def test_the_end_shows_what_was_held_back() -> None:
    half = "é".encode()[:1]
    deltas, _, reason = run([b"a", b"st" + half], SamplingParams(stop=["stop"], max_tokens=2))
    assert ("".join(deltas), reason) == ("ast\N{REPLACEMENT CHARACTER}", FinishReason.LENGTH)
    deltas, _, reason = run([b"a", b"sto"], SamplingParams(stop=["stop"]), (EOS,))
    assert ("".join(deltas), reason) == ("asto", FinishReason.STOP)


def test_a_stop_string_in_the_last_token_is_a_stop() -> None:
    _, _, reason = run([b"a", b"b"], SamplingParams(stop=["ab"], max_tokens=2))
    assert reason is FinishReason.STOP


@pytest.mark.parametrize("stop", ["abc", [""], [5], [None]])
def test_stop_must_list_strings(stop: Any) -> None:
    with pytest.raises(TaelError, match="stop must list strings, none empty"):
        SamplingParams(stop=stop)
