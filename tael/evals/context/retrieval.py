"""Tasks whose answers stand in the haystack. A task is ``(rng, room, num_questions) -> Draft``;
where a question needs several facts, there are fewer questions."""

from __future__ import annotations

import ast
import random
from itertools import islice

from tael.evals.context import texts
from tael.evals.context.haystack import Room, spread
from tael.evals.context.sample import Draft, Question
from tael.evals.context.words import (
    CITIES,
    COLOURS,
    FIRST_NAMES,
    LAST_NAMES,
    THINGS,
    keys,
    numbers,
)


def needle_digits(rng: random.Random, room: Room, num_questions: int) -> Draft:
    names, codes = keys(rng, num_questions), numbers(rng, num_questions)
    facts = [f"The access code of the {n} is {c}." for n, c in zip(names, codes, strict=True)]
    hidden = room.hide(facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"What is the access code of the {name}?",
            (code,),
            f"The access code of the {name} is",
            depth,
        )
        for name, code, depth in zip(names, codes, hidden.depths, strict=True)
    )
    return Draft(hidden.haystack, questions)


def needle_hex(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """32 hexadecimal digits, of which each must be right."""
    names = keys(rng, num_questions)
    prints = [f"{rng.getrandbits(128):032x}" for _ in names]
    facts = [f"The fingerprint of the {n} is {p}." for n, p in zip(names, prints, strict=True)]
    hidden = room.hide(facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"What is the fingerprint of the {name}?",
            (fingerprint,),
            f"The fingerprint of the {name} is",
            depth,
            max_tokens=48,
        )
        for name, fingerprint, depth in zip(names, prints, hidden.depths, strict=True)
    )
    return Draft(hidden.haystack, questions)


def multikey(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Nothing but keys, made of few words and a number: each has many that look like it."""
    colours, things = rng.sample(COLOURS, 12), rng.sample(THINGS, 12)
    places = [(c, t, n) for c in colours for t in things for n in range(10, 100)]
    rng.shuffle(places)
    codes = numbers(rng, len(places))
    lines = [f"{c}-{t}-{n}: {code}" for (c, t, n), code in zip(places, codes, strict=True)]
    lines = room.take(lines)
    rows = spread(rng, len(lines), num_questions)
    questions = []
    for row, depth in zip(rows, room.depths(lines, rows), strict=True):
        key, code = lines[row].split(": ")
        question = f"Which number stands after {key}?"
        questions.append(Question(question, (code,), f"{key}:", depth))
    return Draft("\n".join(lines), tuple(questions))


def multivalue(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Three values of one key, far from one another."""
    num_questions = max(1, num_questions // 2)
    names, codes = keys(rng, num_questions), numbers(rng, 3 * num_questions)
    owners = names * 3
    facts = [f"One of the codes of the {n} is {c}." for n, c in zip(owners, codes, strict=True)]
    hidden = room.hide(facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"What are the three codes of the {name}?",
            tuple(codes[i::num_questions]),
            f"The three codes of the {name} are",
            sum(hidden.depths[i::num_questions]) / 3,
            max_tokens=48,
        )
        for i, name in enumerate(names)
    )
    return Draft(hidden.haystack, questions)


def multiquery(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Three keys in one question."""
    names, codes = keys(rng, num_questions + 2), numbers(rng, num_questions + 2)
    facts = [f"The access code of the {n} is {c}." for n, c in zip(names, codes, strict=True)]
    triples = [rng.sample(range(len(names)), 3) for _ in range(max(1, num_questions // 2))]
    hidden = room.hide(facts, texts.prose(rng), rng)
    questions = []
    for chosen in triples:
        a, b, c = (names[i] for i in chosen)
        questions.append(
            Question(
                f"What are the access codes of the {a}, the {b} and the {c}?",
                tuple(codes[i] for i in chosen),
                f"The access codes of the {a}, the {b} and the {c} are",
                sum(hidden.depths[i] for i in chosen) / 3,
                max_tokens=64,
            )
        )
    return Draft(hidden.haystack, tuple(questions))


def entities(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Each person asked for has three others beside it that differ in one name or the city."""
    num_questions = max(1, num_questions // 2)
    firsts, lasts, cities = (
        rng.sample(pool, 2 * num_questions) for pool in (FIRST_NAMES, LAST_NAMES, CITIES)
    )
    people = []
    for i in range(0, 2 * num_questions, 2):
        person = (firsts[i], lasts[i], cities[i])
        people += [person, (firsts[i + 1], *person[1:]), (person[0], lasts[i + 1], person[2])]
        people.append((*person[:2], cities[i + 1]))
    codes = dict(zip(people, numbers(rng, len(people)), strict=True))
    asked = people[::4]
    rng.shuffle(people)
    facts = [f"{f} {n} from {c} has the member number {codes[f, n, c]}." for f, n, c in people]
    hidden = room.hide(facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"What is the member number of {first} {last} from {city}?",
            (codes[first, last, city],),
            f"{first} {last} from {city} has the member number",
            hidden.depths[people.index((first, last, city))],
        )
        for first, last, city in asked
    )
    return Draft(hidden.haystack, questions)


def code(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Functions of the standard library, into each of which a line with a number was put: known
    from training are the functions, not the numbers."""
    library = list(islice(texts.functions(rng), room.num_tokens // 20))
    ids = numbers(rng, len(library))
    sources = room.take(
        _with_first_line(source, f"    trace_id = {number}")
        for (_, source), number in zip(library, ids, strict=True)
    )
    rows = spread(rng, len(sources), min(num_questions, len(sources)))
    questions = tuple(
        Question(
            f"Which trace_id is set in the function {library[row][0]}?",
            (ids[row],),
            f"In the function {library[row][0]}, trace_id =",
            depth,
        )
        for row, depth in zip(rows, room.depths(sources, rows), strict=True)
    )
    return Draft("\n".join(sources), questions)


def _with_first_line(source: str, line: str) -> str:
    """``source`` of a function with ``line`` at the start of its body."""
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    lines = source.splitlines()
    lines.insert(function.body[0].lineno - 1, line)
    return "\n".join(lines) + "\n"
