"""Words that keys, people and places are named with, and numbers that nobody guesses."""

# Lists of words read better as text.
# ruff: noqa: SIM905

from __future__ import annotations

import random

COLOURS = (
    "amber azure beige black blue bronze brown copper coral crimson cyan ebony emerald golden "
    "gray green indigo ivory jade lemon lilac lime magenta maroon navy olive orange pearl pink "
    "plum purple red rose ruby scarlet silver teal violet white yellow"
).split()
THINGS = (
    "anchor basket beacon bottle bridge bucket button cabin candle carpet castle chapel clock "
    "compass crown dagger drum engine feather ferry garden hammer harbor helmet kettle ladder "
    "lantern library locker magnet market mirror needle orchard parcel pencil piano pillow "
    "printer puzzle rocket saddle scooter shelter spoon stable statue suitcase tower tractor "
    "trumpet tunnel umbrella vault violin wagon warehouse whistle window workshop"
).split()
FIRST_NAMES = (
    "Alice Bella Carla Diana Edith Fiona Greta Helen Irene Julia Karen Laura Maria Nadia Olivia "
    "Paula Rosa Sofia Tanya Ursula Vera Wendy Arthur Bruno Carlos Daniel Edgar Felix George Henry "
    "Ivan Jonas Karl Louis Martin Nathan Oscar Peter Robert Simon Thomas Victor Walter"
).split()
LAST_NAMES = (
    "Adams Baker Carter Dixon Ellis Fisher Garner Hughes Irving Jensen Keller Larson Mason Newton "
    "Osborne Parker Quinn Reeves Sanders Turner Vaughn Walker Young Zimmerman"
).split()
CITIES = (
    "Athens Berlin Boston Cairo Chicago Denver Dublin Geneva Hamburg Havana Houston Lima Lisbon "
    "London Madrid Milan Moscow Mumbai Munich Nairobi Naples Oslo Paris Prague Quebec Rome Seoul "
    "Sydney Tokyo Toronto Tunis Vienna Warsaw Zurich"
).split()
ROOMS = (
    "attic balcony basement bathroom bedroom cellar classroom corridor garage garden hallway "
    "kitchen laboratory library office pantry playground stable studio workshop"
).split()
OBJECTS = "apple ball book camera hat key lamp letter map milk pen ring rope towel watch".split()


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different ones of 7 digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def keys(rng: random.Random, count: int) -> list[str]:
    """Easy to tell apart: no word occurs in two of them. Raises ValueError if there are not so
    many."""
    pairs = zip(rng.sample(COLOURS, count), rng.sample(THINGS, count), strict=True)
    return [f"{colour} {thing}" for colour, thing in pairs]
