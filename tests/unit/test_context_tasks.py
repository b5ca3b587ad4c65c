"""The tasks of the effective-context suite: samples that are fair, and the same every time."""

from __future__ import annotations

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from tael.errors import TaelError
from tael.evals.context import retrieval, texts
from tael.evals.context.haystack import Room
from tael.evals.context.sample import Question, Sample
from tael.evals.context.scoring import first_things, name_f1, recall
from tael.evals.context.tasks import QUESTION_ROOM, TASKS, make_samples, parse_tasks
from tael.evals.context.words import CITIES, COLOURS, FIRST_NAMES, LAST_NAMES, ROOMS, THINGS

BYTES = SimpleNamespace(encode=lambda text, add_special_tokens=True: list(text.encode()))
"""A tokenizer whose tokens are bytes."""
LENGTH = 6000
NUMBER = re.compile(r"(?<![\w-])\d{7}(?!\d)")


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that need no network and no time."""
    verses = [
        f"Verse {'i' * (i % 40)} was read; and then all of it was forgotten." for i in range(999)
    ]
    functions = [
        (f"work_{i}", f'def work_{i}(x):\n    """Do it."""\n    return x + {i}') for i in range(900)
    ]
    monkeypatch.setattr(texts, "_verses", lambda: verses)
    monkeypatch.setattr(texts, "_functions", lambda: functions)


def samples(task: str, seed: int = 0, length: int = LENGTH) -> list[Sample]:
    return make_samples(BYTES, task, length, num_samples=3, num_questions=8, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_samples_follow_from_the_seed(task: str) -> None:
    assert samples(task) == samples(task)
    assert samples(task) != samples(task, seed=1)
    assert len({sample.haystack for sample in samples(task)}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_are_in_the_haystack_and_not_in_the_question(task: str) -> None:
    for sample in samples(task):
        assert sample.questions
        for question in sample.questions:
            for answer in question.answers:
                assert re.search(rf"\b{answer}\b", sample.haystack)
                assert answer not in question.text + question.lead
            assert 0 <= question.depth <= 1
            assert TASKS[task].score(question, f" {', '.join(question.answers)}.") == 1.0
            assert TASKS[task].score(question, " I do not know.") == 0.0


def test_a_haystack_that_cannot_be_filled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_functions", lambda: [("f", "def f(x):\n    return x + 77")] * 40)
    with pytest.raises(TaelError, match=r"the texts of code are .* too short for 6000"):
        samples("code")


@pytest.mark.parametrize("task", TASKS)
def test_there_are_words_for_fifty_questions(task: str) -> None:
    """The most that `tael bench context` takes."""
    (sample,) = make_samples(
        BYTES,  # type: ignore[arg-type]
        task,
        32768,
        num_samples=1,
        num_questions=50,
        seed=0,
    )
    least = {"frequent_words": 1, "possessions": 15}.get(task, 20)
    assert len({question.text for question in sample.questions}) >= least


@pytest.mark.parametrize("task", TASKS)
def test_haystacks_fill_their_length(task: str) -> None:
    for sample in samples(task):
        num_tokens = len(sample.haystack.encode())
        assert 0.95 * (LENGTH - QUESTION_ROOM) < num_tokens <= LENGTH - QUESTION_ROOM


@pytest.mark.parametrize("task", set(TASKS) - {"multikey", "code", "frequent_words"})
def test_longer_contexts_hide_the_same_facts(task: str) -> None:
    """So that only the haystack makes them harder."""
    for short, long in zip(samples(task), samples(task, length=3 * LENGTH), strict=True):
        assert [q.text for q in short.questions] == [q.text for q in long.questions]
        assert [q.answers for q in short.questions] == [q.answers for q in long.questions]


@pytest.mark.parametrize("task", ["needle_digits", "multikey", "multivalue", "entities", "code"])
def test_no_number_and_no_question_comes_twice(task: str) -> None:
    for sample in samples(task):
        found = NUMBER.findall(sample.haystack)
        assert len(found) == len(set(found)) >= 8
        assert len({q.text for q in sample.questions}) == len(sample.questions)


def test_depths_say_where_the_needles_are() -> None:
    for sample in samples("needle_digits"):
        for i, question in enumerate(sample.questions):
            start = sample.haystack.index(f"The access code of the {question.text[31:-1]}")
            assert question.depth == pytest.approx(start / len(sample.haystack), abs=0.01)
            assert abs(question.depth - (i + 0.5) / 8) < 0.1


def test_keys_of_multikey_have_neighbours_that_differ_in_one_part() -> None:
    sample = samples("multikey", length=20000)[0]
    keys = [tuple(line.split(": ")[0].split("-")) for line in sample.haystack.split("\n")]
    assert len(keys) == len(set(keys)) > 500
    near = Counter(pair for c, t, n in keys for pair in ((c, t), (c, n), (t, n)))
    alone = [k for k in keys if max(near[k[:2]], near[k[0], k[2]], near[k[1:]]) == 1]
    assert len(alone) < len(keys) / 50


def test_entities_have_three_who_are_nearly_the_same() -> None:
    for sample in samples("entities"):
        people = re.findall(r"(\w+) (\w+) from (\w+) has the member number", sample.haystack)
        assert len(people) == len(set(people))
        for question in sample.questions:
            match = re.search(r"of (\w+) (\w+) from (\w+)\?", question.text)
            assert match
            shared = [sum(map(str.__eq__, match.groups(), person)) for person in people]
            assert shared.count(3) == 1 and shared.count(2) == 3


@pytest.mark.parametrize("num_hops", [1, 2, 4])
def test_variables_lead_to_their_values(num_hops: int) -> None:
    for sample in samples(f"variables_{num_hops}"):
        values: dict[str, tuple[str, int]] = {}
        for name, value in re.findall(r"VAR (\w+) = (\w+)", sample.haystack):
            number, hops = values.get(value, (value, -1))
            values[name] = (number, hops + 1)
        for question in sample.questions:
            name = question.text.removesuffix("?").split()[-1]
            assert values[name] == (question.answers[0], num_hops)


def test_stories_end_where_the_answers_say() -> None:
    for sample in samples("whereabouts") + samples("possessions"):
        rooms: dict[str, str] = {}
        owners: dict[str, str] = {}
        for person, verb, place in re.findall(
            r"^(\w+) (went to|took) the (\w+)\.$", sample.haystack, re.MULTILINE
        ):
            if verb == "took":
                owners[place] = person
            else:
                rooms[person] = place
        for question in sample.questions:
            subject = question.lead.split()[-4]
            assert question.answers == (rooms[owners.get(subject, subject)],)


def test_parents_are_all_edges_into_the_child() -> None:
    for sample in samples("parents"):
        edges = re.findall(r"(\w+) is a parent of (\w+)\.", sample.haystack)
        for question in sample.questions:
            child = question.text.split()[-1].removesuffix("?")
            assert set(question.answers) == {p for p, c in edges if c == child}


def test_frequent_words_are_the_most_frequent() -> None:
    for sample in samples("frequent_words"):
        counts = Counter(sample.haystack.split()).most_common(4)
        assert sample.questions[0].answers == tuple(word for word, _ in counts[:3])
        assert counts[2][1] > counts[3][1]


def test_code_has_one_line_more_at_the_start_of_each_body() -> None:
    sample = samples("code")[0]
    compile(sample.haystack, "haystack", "exec")
    for question in sample.questions:
        name = question.text.split()[-1].removesuffix("?")
        assert f"def {name}(x):\n    trace_id = {question.answers[0]}\n" in sample.haystack


def test_the_lists_of_words_have_none_twice() -> None:
    for words in (COLOURS + THINGS, FIRST_NAMES, LAST_NAMES, CITIES, ROOMS):
        assert len(words) == len(set(words))


def test_facts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TaelError, match="ask fewer questions"):
        samples("needle_digits", length=QUESTION_ROOM + 100)
    with pytest.raises(TaelError, match="no task 'haystack'"):
        parse_tasks("multikey,haystack")


def test_facts_keep_their_order() -> None:
    facts = [f"Fact {i}." for i in range(9)]
    room = Room(BYTES, 900)  # type: ignore[arg-type]
    hidden = room.hide(facts, texts.prose(random.Random(0)), random.Random(0))
    assert re.findall(r"Fact \d\.", hidden.haystack) == facts
    assert list(hidden.depths) == sorted(hidden.depths)


def test_a_function_gets_its_line_behind_a_long_signature() -> None:
    source = "def f(\n    a,\n    b=1,\n):\n    return a"
    changed = retrieval._with_first_line(source, "    trace_id = 7")
    assert changed == "def f(\n    a,\n    b=1,\n):\n    trace_id = 7\n    return a\n"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 1234567 and 7654321.", 1.0),
        (" 1234567,7654321", 1.0),
        (" 1,234,567", 0.5),
        (" 12345678", 0.0),
        ("x7654321", 0.0),
    ],
)
def test_recall_wants_whole_numbers(text: str, score: float) -> None:
    question = Question("?", ("1234567", "7654321"), "", 0.5)
    assert recall(question, text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" anchor, basket and bottle.", 1.0),
        (" Bottle anchor anchor", 2 / 3),
        (" ladder lantern anchor basket bottle", 1 / 3),
        (" I do not know.", 0.0),
    ],
)
def test_a_list_that_goes_on_names_no_more_things(text: str, score: float) -> None:
    question = Question("?", ("anchor", "basket", "bottle"), "", 0.5)
    assert first_things(question, text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" Helen and Karl.", 1.0),
        (" Karl", 2 / 3),
        (" Helen, Karl, Rosa and Vera.", 2 / 3),
        (" Nobody.", 0.0),
    ],
)
def test_f1_counts_names_too_many(text: str, score: float) -> None:
    assert name_f1(Question("?", ("Helen", "Karl"), "", 0.5), text) == pytest.approx(score)
