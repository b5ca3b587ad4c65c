"""Tasks whose answers must be put together from several places of the haystack."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

from tael.evals.context import texts
from tael.evals.context.haystack import Room
from tael.evals.context.sample import Draft, Question
from tael.evals.context.words import COLOURS, FIRST_NAMES, OBJECTS, ROOMS, THINGS, numbers


def variables(num_hops: int) -> Callable[[random.Random, Room, int], Draft]:
    """A task: values that pass from one variable to the next ``num_hops`` times."""

    def task(rng: random.Random, room: Room, num_questions: int) -> Draft:
        words = COLOURS + THINGS
        num_chains = max(1, min(num_questions // 2, len(words) // (num_hops + 1)))
        names = rng.sample(words, num_chains * (num_hops + 1))
        chains = [names[i::num_chains] for i in range(num_chains)]
        values = numbers(rng, num_chains)
        order = sorted(chain for chain in range(num_chains) for _ in range(num_hops + 1))
        rng.shuffle(order)  # which chain goes on; each in its own order
        steps = [0] * num_chains
        facts = []
        for chain in order:
            name, step = chains[chain][steps[chain]], steps[chain]
            value = chains[chain][step - 1] if step else values[chain]
            facts.append(f"VAR {name} = {value}")
            steps[chain] += 1
        hidden = room.hide(facts, texts.prose(rng), rng)
        depths: list[list[float]] = [[] for _ in chains]
        for chain, depth in zip(order, hidden.depths, strict=True):
            depths[chain].append(depth)
        questions = tuple(
            Question(
                f"Which number is the value of VAR {chain[-1]}?",
                (value,),
                f"The value of VAR {chain[-1]} is the number",
                sum(depth) / len(depth),
            )
            for chain, value, depth in zip(chains, values, depths, strict=True)
        )
        return Draft(hidden.haystack, questions)

    return task


def frequent_words(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """The haystack is a list of words, the k-th of them about 1/k**2 as frequent as the first."""
    vocabulary = rng.sample(THINGS, len(THINGS))
    weights = [1 / rank**2 for rank in range(1, len(vocabulary) + 1)]

    def lines() -> Iterator[str]:
        while True:
            yield " ".join(rng.choices(vocabulary, weights, k=12))

    while True:
        text = "\n".join(room.take(lines()))
        counts = Counter(text.split()).most_common(4)
        if counts[2][1] > counts[3][1]:  # else the third is not the only one
            break
    words = tuple(word for word, _ in counts[:3])
    question = "Which three words occur most often in the list of words?"
    lead = "The three words that occur most often are"
    return Draft(text, (Question(question, words, lead, 0.5),))


def whereabouts(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Where people are, after they went from room to room (the first task of bAbI)."""
    people = rng.sample(FIRST_NAMES, max(2, num_questions // 2))
    story = _Story(rng, people)
    for _ in range(3):
        for person in rng.sample(people, len(people)):
            story.go(person)
    hidden = room.hide(story.facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"In which room is {person} at the end?",
            (story.rooms[person],),
            f"At the end, {person} is in the",
            hidden.depths[story.last_row[person]],
            max_tokens=4,
        )
        for person in people
    )
    return Draft(hidden.haystack, questions)


def possessions(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """Where things are that people took along (the second task of bAbI)."""
    people = rng.sample(FIRST_NAMES, max(2, min(num_questions // 2, len(OBJECTS))))
    things = dict(zip(people, rng.sample(OBJECTS, len(people)), strict=True))
    story = _Story(rng, people)
    for act in (story.go, lambda person: story.take(person, things[person]), story.go):
        for person in rng.sample(people, len(people)):
            act(person)
    hidden = room.hide(story.facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"In which room is the {thing} at the end?",
            (story.rooms[person],),
            f"At the end, the {thing} is in the",
            hidden.depths[story.last_row[person]],
            max_tokens=4,
        )
        for person, thing in things.items()
    )
    return Draft(hidden.haystack, questions)


def parents(rng: random.Random, room: Room, num_questions: int) -> Draft:
    """A graph whose edges lie apart; all edges into a node are asked for."""
    names = rng.sample(FIRST_NAMES, min(len(FIRST_NAMES), 2 * num_questions))
    children = names[: max(1, num_questions // 2)]
    above = {child: rng.sample([n for n in names if n != child], 2) for child in children}
    edges = [(parent, child) for child in children for parent in above[child]]
    rng.shuffle(edges)
    facts = [f"{parent} is a parent of {child}." for parent, child in edges]
    hidden = room.hide(facts, texts.prose(rng), rng)
    questions = tuple(
        Question(
            f"Who are the two parents of {child}?",
            tuple(above[child]),
            f"The two parents of {child} are",
            sum(hidden.depths[edges.index((p, child))] for p in above[child]) / 2,
            max_tokens=12,
        )
        for child in children
    )
    return Draft(hidden.haystack, questions)


class _Story:
    """People in rooms. ``rooms`` and ``last_row`` say where each is and which fact said so."""

    def __init__(self, rng: random.Random, people: list[str]) -> None:
        self._rng = rng
        self.rooms: dict[str, str] = dict.fromkeys(people, "")
        self.last_row: dict[str, int] = {}
        self.facts: list[str] = []

    def go(self, person: str) -> None:
        others = [room for room in ROOMS if room != self.rooms[person]]
        self.rooms[person] = self._rng.choice(others)
        self.last_row[person] = len(self.facts)
        self.facts.append(f"{person} went to the {self.rooms[person]}.")

    def take(self, person: str, thing: str) -> None:
        self.facts.append(f"{person} took the {thing}.")
