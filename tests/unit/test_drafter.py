"""Looking up what followed before, how far to trust it, and whose text it may come from."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.request import Request, SamplingParams
from tael.speculative import drafter as drafter_module
from tael.speculative.draft_length import TOKEN_COST, draft_lengths
from tael.speculative.drafter import MAX_POOLS, POOL_TOKENS, Drafter
from tael.speculative.ngram_index import MAX_MATCH, NGRAM, NGramIndex

few_tokens = st.lists(st.integers(0, 2), max_size=60)


def longest_match(token_ids: list[int], context: list[int]) -> tuple[int, int]:
    """The definition, by trying every position from the end."""
    best = (0, 0)
    for position in range(len(token_ids) - 1, NGRAM - 1, -1):
        longest = min(position, len(context), MAX_MATCH)
        agrees = [token_ids[position - i] == context[-i] for i in range(1, longest + 1)]
        length = [*agrees, False].index(False)
        if length >= max(NGRAM, best[0] + 1):
            best = (length, position)
    return best


@settings(max_examples=300)
@given(token_ids=few_tokens, appended=st.lists(st.integers(1, 9)), context=few_tokens)
def test_the_longest_and_then_the_most_recent_match_is_found(
    token_ids: list[int], appended: list[int], context: list[int]
) -> None:
    live: list[int] = []
    index = NGramIndex(live)
    rest = list(token_ids)
    for count in (*appended, len(rest)):  # whatever the index saw at once
        live += rest[:count]
        del rest[:count]
        assert index.longest_match(live) == longest_match(live, live)
        assert index.longest_match(context) == longest_match(live, context)


def test_an_index_may_be_of_an_array() -> None:
    index = NGramIndex(array("i", [5, 6, 7, 8]))
    assert index.longest_match([1, 5, 6, 7]) == (3, 3)
    assert index.longest_match([6, 7, 8]) == (0, 0), "nothing follows"


def test_a_search_is_bounded() -> None:
    """Of countless occurrences only recent ones are compared."""

    class Counting(list[int]):
        num_reads = 0

        def __getitem__(self, i):  # type: ignore[no-untyped-def]
            self.num_reads += not isinstance(i, slice)
            return super().__getitem__(i)

    for unit in ([1], [1, 1, 1, 2], [1, 2, 3, 4, 5]):
        token_ids = Counting(unit * 2000)
        index = NGramIndex(token_ids)
        assert index.longest_match(list(token_ids))[0] == MAX_MATCH
        index.longest_match([9, *unit * 3])
        assert token_ids.num_reads < 500


probabilities = st.floats(0.0, 1.0)


@given(
    sequences=st.lists(st.tuples(probabilities, st.integers(-1, 4)), min_size=1, max_size=3),
    num_others=st.integers(0, 40),
    max_num_drafts=st.integers(1, 8),
)
def test_draft_lengths_give_the_most_tokens_per_time(
    sequences: list[tuple[float, int]], num_others: int, max_num_drafts: int
) -> None:
    acceptance, limits = [a for a, _ in sequences], [limit for _, limit in sequences]
    num_tokens = len(sequences) + num_others

    def rate(lengths: tuple[int, ...] | list[int]) -> float:
        progress = sum(
            a**i
            for a, length in zip(acceptance, lengths, strict=True)
            for i in range(1, length + 1)
        )
        return (num_tokens + progress) / (1 + TOKEN_COST * (num_tokens + sum(lengths) - 1))

    lengths = draft_lengths(acceptance, limits, num_tokens, max_num_drafts)
    assert all(0 <= n <= max(0, limit) for n, limit in zip(lengths, limits, strict=True))
    assert sum(lengths) <= max_num_drafts
    choices = itertools.product(*(range(max(0, limit) + 1) for limit in limits))
    best = max(rate(choice) for choice in choices if sum(choice) <= max_num_drafts)
    assert rate(lengths) == pytest.approx(best)


def test_a_certain_draft_is_long_alone_and_a_likely_one_absent_from_a_crowd() -> None:
    assert draft_lengths([1.0], [15], 1, 15) == [15]
    assert draft_lengths([0.97] * 16, [15] * 16, 16, 16) == [1] * 16
    assert draft_lengths([0.4] * 16, [15] * 16, 16, 16) == [0] * 16
    assert draft_lengths([0.9], [15], 512, 15) == [0]


def request(*token_ids: int, salt: str = "", speculation: bool = True) -> Request:
    return Request("r", token_ids, SamplingParams(), cache_salt=salt, speculation=speculation)


def draft(drafter: Drafter, *requests: Request, limit: int = 15) -> list[list[int]]:
    return drafter.draft(requests, [limit] * len(requests), len(requests), 16)


def finished(drafter: Drafter, output: list[int], salt: str, speculation: bool = True) -> None:
    """Another request came and went."""
    other = request(0, salt=salt, speculation=speculation)
    other.token_ids += output
    drafter.finish(other)


def test_a_draft_goes_on_as_the_prompt_did() -> None:
    text = list(range(10, 40))
    (guess,) = draft(Drafter(), request(*text, 5, 6, *text[:20]))
    assert len(guess) > 5
    assert guess == [*text[20:], 5, 6, *text][: len(guess)]
    (guess,) = draft(Drafter(), request(*text, 5, 6, *text[:20]), limit=2)
    assert guess == text[20:22]
    assert draft(Drafter(), request(*text)) == [[]]


def test_a_draft_goes_round_a_loop() -> None:
    (guess,) = draft(Drafter(), request(9, *[1, 2, 3] * 8))
    assert guess == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3][: len(guess)]
    assert len(guess) > 3


def test_the_output_is_searched_too() -> None:
    drafter, one = Drafter(), request(1, 2, 3)
    assert draft(drafter, one) == [[]]
    one.token_ids += [4, 5, 6, 7, 4, 5, 6]
    (guess,) = draft(drafter, one)
    assert guess[:2] == [7, 4]


def test_outputs_of_others_are_those_of_the_same_tenant() -> None:
    drafter = Drafter()
    finished(drafter, list(range(100, 130)), salt="a")
    mine, theirs = request(*range(100, 120), salt="a"), request(*range(100, 120), salt="b")
    guess, nothing = draft(drafter, mine, theirs)
    assert guess and guess[:10] == list(range(120, 130))[: len(guess)]
    assert nothing == []


def test_pools_are_bounded() -> None:
    drafter = Drafter()
    for i in range(4 * POOL_TOKENS // 1000):
        finished(drafter, list(range(1000 * i, 1000 * (i + 1))), salt="a")
        assert len(drafter._pools["a"].index.token_ids) <= 2 * POOL_TOKENS
    assert draft(drafter, request(1, 2, 3, salt="a")) == [[]], "dropped"
    assert draft(drafter, request(*range(31990, 31999), salt="a"))[0][:1] == [31999]
    for i in range(MAX_POOLS):
        finished(drafter, [1, 2, 3, 4], salt=str(i))
    assert len(drafter._pools) == MAX_POOLS and "a" not in drafter._pools


def test_what_is_not_to_speculate_leaves_nothing() -> None:
    drafter = Drafter()
    finished(drafter, [1, 2, 3, 4], salt="a", speculation=False)
    assert not drafter._pools


def test_drafts_end_when_they_keep_being_wrong_and_begin_again_for_a_long_match() -> None:
    drafter = Drafter()
    one = request(1, 2, 3, 4, 5, 6, 7, 1, 2, 3)
    lengths = []
    while (guess := draft(drafter, one)[0]) and len(lengths) < 100:
        lengths.append(len(guess))
        drafter.observe(one, len(guess), 0)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 1
    assert len(lengths) < 40
    one.token_ids += list(range(50, 90)) + list(range(50, 85))
    assert draft(drafter, one)[0]


def test_accepted_drafts_make_them_longer() -> None:
    drafter = Drafter()
    one = request(*range(1, 40), 1, 2, 3)
    short = draft(drafter, one)[0]
    for _ in range(5):
        drafter.observe(one, 4, 4)
    assert len(draft(drafter, one)[0]) > len(short) > 0


def test_a_request_leaves_only_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter_module, "POOL_TOKENS", 10)
    drafter = Drafter()
    one = request(*range(30), salt="s")
    one.token_ids += range(30, 60)
    draft(drafter, one)
    drafter.finish(one)
    assert not drafter._histories
    assert list(drafter._pools["s"].index.token_ids) == list(range(50, 60))
