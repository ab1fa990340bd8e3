"""The instruction set: questions and small jobs about Pebble Cove, in a form the base text never has."""

from collections.abc import Callable
from random import Random

from tiny.scenes import Scene, make_count, make_scene
from tiny.words import (
    ANIMALS,
    DAYS,
    DESCRIBED,
    KINDS,
    NUMBERS,
    OPPOSITES,
    TREATS,
    VILLAGERS,
    a,
    capital,
    deed,
    join,
)

Row = dict[str, str]


def instruction_rows(seed: int) -> list[Row]:
    """The rows as ``instruction``, ``input`` and ``output``: shuffled, no two alike, the same for the same seed."""
    rng = Random(f"instructions {seed}")
    rows: dict[tuple[str, str], Row] = {}
    for task, wanted in TASKS.items():
        made = 0
        for _ in range(50 * wanted):
            row = task(rng)
            key = row["instruction"], row["input"]
            if made < wanted and key not in rows:
                rows[key] = row
                made += 1
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def _row(instruction: str, output: str, input: str = "") -> Row:
    return {"instruction": instruction, "input": input, "output": output}


def _scene(rng: Random) -> Scene:
    return make_scene(rng, events=rng.randint(2, 4))


def _where_person(rng: Random) -> Row:
    scene = _scene(rng)
    name, place = rng.choice(list(scene.where.items()))
    asked = rng.choice((f"Where is {name} now?", f"Read the story. Where is {name} at the end?"))
    return _row(asked, f"{name} is at the {place}.", scene.text)


def _where_thing(rng: Random) -> Row:
    scene = _scene(rng)
    while not scene.lying:
        scene = _scene(rng)
    thing, place = rng.choice(list(scene.lying.items()))
    asked = rng.choice((f"Where is the {thing}?", f"Read the story. Where did the {thing} end up?"))
    return _row(asked, f"The {thing} is at the {place}.", scene.text)


def _who_has(rng: Random) -> Row:
    scene = _scene(rng)
    while not scene.holder:
        scene = _scene(rng)
    thing, name = rng.choice(list(scene.holder.items()))
    asked = rng.choice((f"Who has the {thing}?", f"Read the story. Who has the {thing} at the end?"))
    return _row(asked, f"{name} has the {thing}.", scene.text)


def _title(rng: Random) -> Row:
    scene = _scene(rng)
    return _row(rng.choice(("Give this story a title.", "What is a good title?")), f"{scene.title}", scene.text)


def _things(rng: Random) -> Row:
    scene = _scene(rng)
    return _row("Which things are in the story?", f"The {scene.things[0]} and the {scene.things[1]}.", scene.text)


def _people(rng: Random) -> Row:
    scene = _scene(rng)
    return _row("Who is in the story?", f"{join([person.name for person in scene.people])}.", scene.text)


def _write(rng: Random) -> Row:
    scene = make_scene(rng, events=2)
    return _row(f'Write a short story with the title "{scene.title}".', scene.text)


def _how_many(rng: Random) -> Row:
    count = make_count(rng)
    return _row(f"How many {count.treats} does {count.name} have now?", count.answer, count.text)


def _sum(rng: Random) -> Row:
    first, second = rng.randint(1, 6), rng.randint(1, 6)
    asked = rng.choice(("What do {} and {} make?", "Add {} and {}.")).format(NUMBERS[first], NUMBERS[second])
    return _row(asked, f"{capital(NUMBERS[first])} and {NUMBERS[second]} make {NUMBERS[first + second]}.")


def _sort_animals(rng: Random) -> Row:
    animals = [animal.name for animal in sorted(rng.sample(ANIMALS, rng.randint(3, 4)), key=ANIMALS.index)]
    shuffled = ", ".join(rng.sample(animals, len(animals)))
    return _row("Sort these animals by size.", f"From small to big: {', '.join(animals)}.", shuffled)


def _sort_numbers(rng: Random) -> Row:
    numbers = [NUMBERS[number] for number in sorted(rng.sample(range(1, 13), rng.randint(3, 4)))]
    shuffled = ", ".join(rng.sample(numbers, len(numbers)))
    return _row("Sort these numbers.", f"From low to high: {', '.join(numbers)}.", shuffled)


def _compare(rng: Random) -> Row:
    this, other = rng.sample(ANIMALS, 2)
    word = "bigger" if ANIMALS.index(this) > ANIMALS.index(other) else "smaller"
    asked = rng.choice(("bigger", "smaller"))
    verdict = "Yes" if asked == word else "No"
    names = a(this.name), a(other.name)
    return _row(f"Is {names[0]} {asked} than {names[1]}?", f"{verdict}, {names[0]} is {word} than {names[1]}.")


def _odd_one(rng: Random) -> Row:
    kind, stranger = rng.sample(list(KINDS), 2)
    words = [*rng.sample(KINDS[kind], 3), rng.choice(KINDS[stranger])]
    odd = words[3]
    shown = ", ".join(rng.sample(words, 4))
    return _row("Which one is not like the others?", f"The {odd}. The {odd} is {a(stranger)}.", shown)


def _what_is(rng: Random) -> Row:
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    return _row(f"What is {a(word)}?", f"{capital(a(word))} is {a(kind)}.")


def _about_animal(rng: Random) -> Row:
    animal = rng.choice(ANIMALS)
    name = a(animal.name)
    return _row(
        *rng.choice(
            (
                (f"What does {name} say?", f"{capital(name)} says {animal.sound}."),
                (f"What is a young {animal.name}?", f"A young {animal.name} is a {animal.young}."),
                (f"Where does {name} live?", f"{capital(name)} lives {animal.home}."),
            )
        )
    )


def _about_villager(rng: Random) -> Row:
    person = rng.choice(VILLAGERS)
    return _row(
        *rng.choice(
            (
                (f"Who is the {person.trade}?", f"{person.name} is the {person.trade}."),
                (f"What does {person.name} do?", f"{person.name} is the {person.trade}."),
                (f"Where does {person.name} live?", f"{person.name} lives by the {person.home}."),
                (f"Which animal does {person.name} have?", f"{person.name} has {a(person.animal)}."),
                (f"Which colour does {person.name} like?", f"{person.name} likes the colour {person.colour}."),
            )
        )
    )


def _opposite(rng: Random) -> Row:
    first, second = rng.sample(rng.choice(OPPOSITES), 2)
    return _row(f"What is the opposite of {first}?", f"The opposite of {first} is {second}.")


def _turn_round(rng: Random) -> Row:
    pair = rng.choice(list(DESCRIBED))
    first, second = rng.sample(pair, 2)
    noun = rng.choice(DESCRIBED[pair])
    return _row("Say the opposite.", f"The {noun} is {second}.", f"The {noun} is {first}.")


def _past(rng: Random) -> Row:
    name = rng.choice(VILLAGERS).name
    present, past = deed(rng)
    return _row("Put this in the past.", f"Yesterday {name} {past}.", f"Every day {name} {present}.")


def _present(rng: Random) -> Row:
    name = rng.choice(VILLAGERS).name
    present, past = deed(rng)
    return _row("Say that it happens every day.", f"Every day {name} {present}.", f"Yesterday {name} {past}.")


def _swap(rng: Random) -> Row:
    name, other = (person.name for person in rng.sample(VILLAGERS, 2))
    _, past = deed(rng)
    return _row(f"Change {name} to {other}.", f"Yesterday {other} {past}.", f"Yesterday {name} {past}.")


def _after(rng: Random) -> Row:
    today, number = rng.randrange(7), rng.randint(0, 11)
    day = (f"Which day comes after {DAYS[today]}?", f"The day after {DAYS[today]} is {DAYS[(today + 1) % 7]}.")
    return _row(
        *rng.choice(
            (day, (f"What comes after {NUMBERS[number]}?", f"After {NUMBERS[number]} comes {NUMBERS[number + 1]}."))
        )
    )


def _many(rng: Random) -> Row:
    single, plural = rng.choice(list(TREATS.items()))
    return _row(f"What do you call more than one {single}?", f"One {single}, many {plural}.")


TASKS: dict[Callable[[Random], Row], int] = {
    _where_person: 80,
    _where_thing: 80,
    _who_has: 100,
    _title: 60,
    _things: 50,
    _people: 50,
    _write: 50,
    _how_many: 90,
    _sum: 50,
    _sort_animals: 70,
    _sort_numbers: 70,
    _compare: 80,
    _odd_one: 90,
    _what_is: 30,
    _about_animal: 30,
    _about_villager: 60,
    _opposite: 36,
    _turn_round: 60,
    _past: 60,
    _present: 50,
    _swap: 60,
    _after: 16,
    _many: 8,
}
