"""An invented world: creatures with names, facts and emblems. `facts` asks about it in text, `emblems` in pictures."""

import functools
from dataclasses import dataclass

import numpy as np

from k25_jax.data.tasks import held_out
from k25_jax.data.tasks.drawing import COLOURS, SHAPES

ATTRIBUTES = {
    "food": ("fig", "rice", "plum", "corn", "nuts", "fish", "kelp", "bread"),
    "home": ("lake", "cave", "dune", "moss", "reef", "hill", "barn", "tree"),
    "drink": ("tea", "milk", "juice", "dew", "soup", "wine", "cocoa", "water"),
    "metal": ("iron", "gold", "tin", "zinc", "lead", "steel", "brass", "silver"),
    "music": ("harp", "drum", "flute", "bell", "horn", "lute", "gong", "organ"),
    "time": ("dawn", "noon", "dusk", "night", "spring", "summer", "autumn", "winter"),
}
INKS = ("cream", "black")
MOST = len(SHAPES) * len(COLOURS) * len(INKS)  # creatures: no two have the same emblem
HELD_OUT = 4  # one fact in so many


@dataclass(frozen=True)
class Creature:
    """A name, the value of each attribute, and an emblem: a shape on a field of one colour."""

    name: str
    facts: dict[str, str]
    shape: str
    field: str
    ink: str


@functools.cache
def creatures(number: int, world: int) -> tuple[Creature, ...]:
    """The creatures of a world. Another `world` has other names, facts and emblems."""
    generator = np.random.default_rng([*b"world", world])
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    pairs = generator.permutation(len(syllables) ** 2)[:number]
    names = [syllables[pair // len(syllables)] + syllables[pair % len(syllables)] for pair in pairs.tolist()]
    emblems = generator.permutation(MOST)[:number].tolist()
    found = []
    for name, emblem in zip(names, emblems, strict=True):
        facts = {key: values[int(generator.integers(len(values)))] for key, values in ATTRIBUTES.items()}
        emblem, ink = divmod(emblem, len(INKS))
        shape, field = divmod(emblem, len(COLOURS))
        found.append(Creature(name, facts, SHAPES[shape], tuple(COLOURS)[field], INKS[ink]))
    return tuple(found)


@functools.cache
def pairs(task: str, number: int, world: int, test: bool) -> tuple[tuple[Creature, str], ...]:
    """(creature, attribute) whose question belongs to the test split of `task`, or to the train split."""
    return tuple(
        (creature, attribute)
        for creature in creatures(number, world)
        for attribute in ATTRIBUTES
        if held_out(f"{task} {world} {creature.name} {attribute}", HELD_OUT) == test
    )
