"""Words, sentences, names and towns for the tasks of `ruler`, drawn from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _list("""
    old young quiet loud bright dark early late heavy light narrow wide gentle rough clean dusty warm cold hollow
    solid tall low round flat green yellow grey brown wooden iron silent busy distant nearby simple curious
""")
# None of them is a word of `prompts.NOISE`, which may stand before a list.
NOUNS = _list("""
    apple arrow badge barn basket bell bench bird boat book bottle bread bridge broom brush bucket button cabin
    candle canvas carpet castle cave chain chair cheese church clock cloud coat coin corn cotton cup curtain desk
    dish dog door dress drum eagle engine farm feather fence field fire fish flag floor flower forest fork fox
    garden gate glass glove goat grain grape guitar hammer harbor hat hill horse house island jacket jar key kitchen
    kite ladder lake lamp leaf lemon letter lion lock map market meadow mill mirror moon mountain nail needle nest
    oak ocean onion orange oven paint paper path pear pencil piano pillow pipe plate plow pocket pond potato pump
    rabbit rail rain ribbon ring river road roof rope rose salt sand saw scarf school sheep shelf ship shirt shoe
    shop silver snow soap spoon spring star station stone store storm stove street string sugar table tea
    tent thread tower town train tree truck valley vase village violin wagon wall watch water wheel whistle window
    winter wood wool yard
""")
VERBS = _list("""
    sees finds holds moves keeps leaves follows covers passes reaches carries touches
""")
PLACES = ("by the", "near the", "behind the", "under the", "above the", "beside the")
JOBS = _list("""
    baker teacher farmer painter doctor sailor miller tailor driver gardener carpenter printer singer potter
""")
FIRST_NAMES = _list("""
    Ada Amos Anna Basil Clara Cyrus Dora Edith Elias Emil Flora Frank Greta Hanna Hugo Ida Ivan Jonas Julia Karl
    Lena Leon Lydia Magda Max Mina Nora Oscar Otto Paula Peter Rosa Ruth Simon Sofia Theo Vera Viktor Walter Zora
""")
TOWNS = [
    first + second
    for first in _list("Oak Red Stone River Ash High Long Mill North East West South Black White Green Wood")
    for second in _list("ford hill bridge ton field haven brook mouth stead wick")
]


def sentences(random: np.random.Generator, words: int) -> str:
    """Return sentences of at least `words` words together; each is true of nothing and asks for nothing."""
    count = words // 8 + 1

    def pick(choices: Sequence[str]) -> list[str]:
        return [choices[i] for i in random.integers(len(choices), size=count)]

    parts = zip(pick(ADJECTIVES), pick(NOUNS), pick(VERBS), pick(NOUNS), pick(PLACES), pick(NOUNS), strict=True)
    return "".join(f"The {a} {one} {verb} the {other} {place} {third}. " for a, one, verb, other, place, third in parts)


def keys(random: np.random.Generator, count: int) -> list[str]:
    """Return distinct things to hide something under, an adjective and a noun each."""
    found = random.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]} {NOUNS[i // len(ADJECTIVES)]}" for i in found]


def numbers(random: np.random.Generator, count: int) -> list[str]:
    """Return distinct numbers of seven digits."""
    return [str(number) for number in random.choice(9_000_000, count, replace=False) + 1_000_000]


def coded(random: np.random.Generator, count: int, letters: int, alphabet: str) -> list[str]:
    """Return distinct strings of so many letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(alphabet[i] for i in random.integers(len(alphabet), size=letters))] = None
    return list(found)


def compounds(random: np.random.Generator) -> Iterator[str]:
    """Yield words made of two nouns, in a drawn order; each again only after all others."""
    order = random.permutation(len(NOUNS) ** 2)
    return (NOUNS[i // len(NOUNS)] + NOUNS[i % len(NOUNS)] for i in itertools.cycle(order))


def people(random: np.random.Generator) -> Iterator[str]:
    """Yield distinct names."""
    seen = set()
    while True:
        family = "".join("bdfgklmnprstv"[i] + "aeiou"[j] for i, j in random.integers((13, 5), size=(3, 2)))
        name = f"{FIRST_NAMES[random.integers(len(FIRST_NAMES))]} {family.capitalize()}"
        if name not in seen:
            seen.add(name)
            yield name
