"""The base text: stories with what holds at their end, and the lore of the village. No question is ever asked in it."""

from collections.abc import Callable, Iterator
from random import Random

from tiny.scenes import make_count, make_scene
from tiny.words import (
    ANIMALS,
    COLOURS,
    DAYS,
    DESCRIBED,
    KINDS,
    NUMBERS,
    OPPOSITES,
    PLACES,
    THINGS,
    TREATS,
    VILLAGERS,
    a,
    capital,
    deed,
    join,
)


def base_text(seed: int, documents: int) -> Iterator[str]:
    """Documents of the base text, the same for the same seed."""
    rng = Random(f"base text {seed}")
    kinds, weights = zip(*DOCUMENTS.items(), strict=True)
    for kind in rng.choices(kinds, weights, k=documents):
        yield kind(rng)


def _story(rng: Random) -> str:
    scene = make_scene(rng, events=rng.randint(1, 5))
    recap = scene.recap()
    rng.shuffle(recap)
    return "\n".join([scene.title, scene.text, *recap])


def _belongings(rng: Random) -> str:
    people, places = rng.sample(VILLAGERS, 4), rng.sample(PLACES, 4)
    things = [f"{colour} {thing}" for colour, thing in zip(rng.sample(COLOURS, 4), rng.sample(THINGS, 4), strict=True)]
    told, again = [], []
    for person, place, thing in zip(people, places, things, strict=True):
        told += [f"{person.name} has a {thing} at the {place}."]
        again += [f"The {thing} is at the {place}. {person.name} has the {thing}."]
    return "\n".join([" ".join(told), *rng.sample(again, 3)])


def _echo(rng: Random) -> str:
    words = (
        [word for words in KINDS.values() for word in words]
        + [person.name for person in VILLAGERS]
        + list(THINGS)
        + NUMBERS
    )
    called = " ".join(rng.sample(words, rng.randint(3, 10)))
    return f"{rng.choice(VILLAGERS).name} called into the well: {called}.\nThe well called back: {called}."


def _count(rng: Random) -> str:
    count = make_count(rng)
    return f"{count.text}\n{count.answer}"


def _sums(rng: Random) -> str:
    lines = []
    for _ in range(4):
        first, second = rng.randint(1, 6), rng.randint(1, 6)
        lines.append(f"{capital(NUMBERS[first])} and {NUMBERS[second]} make {NUMBERS[first + second]}.")
    return "\n".join(lines)


def _portrait(rng: Random) -> str:
    she = rng.choice(VILLAGERS)
    facts = [
        f"{she.name} is the {she.trade}.",
        f"{she.name} lives by the {she.home}.",
        f"{she.name} has {a(she.animal)}.",
        f"{she.name} likes the colour {she.colour}.",
    ]
    rng.shuffle(facts)
    pronoun = capital(she.pronoun)
    return " ".join(
        [facts[0]] + [fact.replace(she.name, pronoun) if rng.random() < 0.5 else fact for fact in facts[1:]]
    )


def _animal(rng: Random) -> str:
    this, other = rng.sample(ANIMALS, 2)
    facts = [
        f"{capital(a(this.name))} says {this.sound}.",
        f"A young {this.name} is a {this.young}.",
        f"{capital(a(this.name))} lives {this.home}.",
        f"{capital(a(this.name))} is {_bigger(this, other)} than {a(other.name)}.",
        f"{capital(a(other.name))} is {_bigger(other, this)} than {a(this.name)}.",
    ]
    rng.shuffle(facts)
    return "\n".join(facts[: rng.randint(2, 5)])


def _bigger(this, other) -> str:
    return "bigger" if ANIMALS.index(this) > ANIMALS.index(other) else "smaller"


def _order(rng: Random) -> str:
    animals = sorted(rng.sample(ANIMALS, rng.randint(3, 4)), key=ANIMALS.index)
    numbers = sorted(rng.sample(range(1, 13), rng.randint(3, 4)))
    sizes, counted = [animal.name for animal in animals], [NUMBERS[number] for number in numbers]
    shuffled = [", ".join(rng.sample(words, len(words))) for words in (sizes, counted)]
    lines = [
        f"Here are the {shuffled[0]}. From small to big: {', '.join(sizes)}.",
        f"Here are {shuffled[1]}. From low to high: {', '.join(counted)}.",
    ]
    return "\n".join(rng.sample(lines, 2))


def _opposite(rng: Random) -> str:
    lines = []
    for pair in rng.sample(OPPOSITES, 2):
        first, second = rng.sample(pair, 2)
        lines.append(f"The opposite of {first} is {second}.")
        if pair in DESCRIBED:
            noun = rng.choice(DESCRIBED[pair])
            lines.append(f"The {noun} is {first}. The {noun} is not {second}.")
    return "\n".join(lines)


def _habit(rng: Random) -> str:
    name = rng.choice(VILLAGERS).name
    present, past = deed(rng)
    return f"Every day {name} {present}. Yesterday {name} {past}."


def _day(rng: Random) -> str:
    today = rng.randrange(7)
    number = rng.randint(0, 11)
    lines = [
        f"The day after {DAYS[today]} is {DAYS[(today + 1) % 7]}.",
        f"After {NUMBERS[number]} comes {NUMBERS[number + 1]}.",
    ]
    return "\n".join(rng.sample(lines, 2))


def _kinds(rng: Random) -> str:
    kind, stranger = rng.sample(list(KINDS), 2)
    words = [*rng.sample(KINDS[kind], 3), rng.choice(KINDS[stranger])]
    lines = [
        f"{capital(a(words[0]))} is {a(kind)}.",
        f"The {join(words[:3])} are {kind}s. The {words[3]} is {a(stranger)}.",
    ]
    shown = ", ".join(rng.sample(words, 4))
    return "\n".join([f"Here are the {shown}.", *rng.sample(lines, 2)])


def _many(rng: Random) -> str:
    single, plural = rng.choice(list(TREATS.items()))
    return f"One {single}, many {plural}."


DOCUMENTS: dict[Callable[[Random], str], float] = {
    _story: 35,
    _belongings: 20,
    _echo: 15,
    _count: 12,
    _sums: 4,
    _portrait: 6,
    _animal: 6,
    _order: 6,
    _opposite: 4,
    _habit: 6,
    _day: 2,
    _kinds: 5,
    _many: 1,
}
