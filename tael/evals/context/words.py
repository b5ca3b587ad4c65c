"""Words that keys, people and places are named with, and numbers that nobody guesses."""

# Lists of words read better as text.
# ruff: noqa: SIM905

from __future__ import annotations

import random

COLOURS = (
    "amber aqua azure beige black blue bronze brown burgundy charcoal cherry chestnut copper coral "
    "cream crimson cyan ebony emerald golden gray green indigo ivory jade khaki lavender lemon "
    "lilac lime magenta maroon mint mustard navy ochre olive orange peach pearl pink plum purple "
    "red rose ruby salmon scarlet silver tan teal turquoise violet white yellow"
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
    "Ivan Jonas Karl Louis Martin Nathan Oscar Peter Robert Simon Thomas Victor Walter Adrian "
    "Beatrice Conrad Dorothy Emil Flora Gavin"
).split()
LAST_NAMES = (
    "Adams Archer Baker Barnes Carter Conway Dixon Dalton Ellis Emerson Fisher Foster Garner "
    "Gibson Hughes Hudson Irving Ingram Jensen Jarvis Keller Knight Larson Lambert Mason Morris "
    "Newton Nolan Osborne Oakley Parker Porter Quinn Reeves Rhodes Sanders Sutton Turner Tucker "
    "Underwood Vaughn Vernon Walker Watson Yates Young Zimmerman Chandler Bishop Marsh"
).split()
CITIES = (
    "Ankara Athens Bergen Berlin Bogota Boston Bremen Cairo Calgary Chicago Dallas Denver Dublin "
    "Florence Geneva Glasgow Hamburg Hanoi Havana Helsinki Houston Jakarta Kyoto Lagos Leipzig "
    "Lima Lisbon London Lyon Madrid Manila Milan Moscow Mumbai Munich Nairobi Naples Oslo Paris "
    "Porto Prague Quebec Riga Rome Seoul Sydney Tokyo Toronto Tunis Vienna Warsaw Zurich"
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
