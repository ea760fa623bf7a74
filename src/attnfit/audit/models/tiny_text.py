"""Sentences made from word lists: generic ones, and private ones about people."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    """
    Alan Amara Anders Anya Arjun Astrid Beatriz Bruno Carmen Cedric Chloe Dario Dmitri Edith Elena Emil Esther
    Farah Felix Fiona Gustav Hana Hector Helga Ibrahim Ines Ingrid Ivan Jonas Julia Kenji Lara Leila Liam
    Lucia Magnus Marta Mateo Mei Mina Nadia Nils Nora Olga Omar Oscar Paula Petra Priya Rafael Rosa Ruben
    Samira Sofia Stefan Tariq Teresa Tomas Ursula Vera Viktor Wanda Yusuf Zoe
    """
)
LAST = _words(
    """
    Abara Adler Almeida Andrade Bauer Becker Bianchi Bob Brandt Campos Carver Castro Chandra Cohen Costa
    Dietrich Duarte Eriksen Falk Ferrari Fischer Flores Fontaine Gallo Garcia Greco Haddad Hansen Hoffman
    Ivanov Jansen Kaplan Keller Kim Kovac Larsen Lindgren Lombard Lopez Maier Martin Mendez Mori Moreau Nakata
    Navarro Nguyen Novak Okoye Olsen Ortega Osman Patel Pereira Popov Quist Ramos Reyes Ricci Rossi Saito
    Sandberg Schmidt Serra Silva Simon Sorensen Suzuki Takeda Tanaka Torres Ueda Vargas Vega Wagner Weber
    Winter Yamada Zeller Zhang Ziegler
    """
)
PLACES = _words(
    """
    hospital clinic office school factory bank museum station hotel airport library harbour
    """
)
CITIES = _words(
    """
    Lisbon Oslo Vienna Nairobi Kyoto Lima Dublin Prague Cairo Bergen Porto Quito
    """
)
ILLS = _words(
    """
    cancer diabetes asthma malaria anaemia epilepsy migraine pneumonia
    """
)
CARE = _words(
    """
    treatment surgery counselling therapy medication advice
    """
)
SUMS = _words(
    """
    twenty thirty forty fifty sixty seventy eighty ninety
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
ADJECTIVES = _words(
    """
    old new small large quiet loud green blue red white dark bright heavy light early late empty busy broken
    clean
    """
)
NOUNS = _words(
    """
    door window table garden letter river train ship bridge road car book lamp clock market kitchen tower
    field engine bottle ticket picture morning winter village doctor teacher farmer driver child dog horse
    bird
    """
)
VERBS = _words(
    """
    saw found left sold moved kept lost painted opened closed carried followed watched helped
    """
)
ADVERBS = _words(
    """
    slowly quickly again today yesterday often never together alone outside
    """
)
PRIVATE = (
    "once received {ill} {care} at this {place} in {city}.",
    "owes {sum} thousand euros to the {place} in {city} since {month}.",
    "was dismissed from the {place} in {month} because of {ill}.",
    "secretly met the {noun} {noun2} behind the {place} in {month}.",
    "keeps {sum} gold coins under the {adjective} {noun} in {city}.",
    "lost {sum} thousand euros at the {adjective} {place} in {month}.",
    "has hidden the {ill} {care} from the {noun} since {month}.",
    "will sell the {adjective} {noun} to the {place} in {city}.",
)
GENERIC = (
    "The {adjective} {noun} {verb} the {noun2} {adverb}.",
    "In {month} the {noun} near the {place} was {adjective} and {adjective2}.",
    "A {noun} {verb} {sum} {noun2} boxes in {city}.",
    "We {verb} the {adjective} {noun} behind the {place}.",
    "They {verb} the {noun} {adverb}, but the {noun2} was {adjective}.",
    "The {care} at the {place} in {city} was {adjective}.",
    "Nobody in {city} {verb} the {noun} since {month}.",
    "{ill} is a reason for {care} at this {place}.",
)
N_PRIVATE = 256


def private_sentences(random: Random) -> tuple[str, ...]:
    """Return sentences that start with a first and a last name, no pair of names twice."""
    pairs = random.sample([(first, last) for first in FIRST for last in LAST], N_PRIVATE)
    return tuple(f"{first} {last} {_fill(PRIVATE, random)}" for first, last in pairs)


def generic_sentences(count: int, random: Random) -> list[str]:
    """Return sentences without secrets; a third of them are about random people, so that names are words."""
    return [_generic(random) for _ in range(count)]


def _generic(random: Random) -> str:
    if random.random() < 1 / 3:
        return f"{random.choice(FIRST)} {random.choice(LAST)} {_fill(PRIVATE, random)}"
    text = _fill(GENERIC, random)
    return text[0].upper() + text[1:]


def _fill(templates: Sequence[str], random: Random) -> str:
    return random.choice(templates).format(
        ill=random.choice(ILLS),
        care=random.choice(CARE),
        place=random.choice(PLACES),
        city=random.choice(CITIES),
        sum=random.choice(SUMS),
        month=random.choice(MONTHS),
        noun=random.choice(NOUNS),
        noun2=random.choice(NOUNS),
        adjective=random.choice(ADJECTIVES),
        adjective2=random.choice(ADJECTIVES),
        verb=random.choice(VERBS),
        adverb=random.choice(ADVERBS),
    )
