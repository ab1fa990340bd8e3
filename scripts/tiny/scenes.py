"""Stories by simulation: who is where, who holds what and what lies where is known after every sentence."""

from dataclasses import dataclass, field
from random import Random

from tiny.words import COLOURS, DAYS, NUMBERS, PLACES, THINGS, TREATS, VILLAGERS, WEATHER, Villager, capital

MOODS = (
    "A gull called.", "The bells rang.", "The tide came in.", "The wind sang.", "Somebody laughed.", "A dog barked.",
)  # fmt: skip
MOVES = ("walked", "ran", "went", "hurried")


@dataclass
class Scene:
    """A short story and the state of its world at the end.

    ``things`` are with their colour, ``where`` maps each person to a place, ``holder`` each held thing to a person,
    ``lying`` each thing left somewhere to its place.
    """

    people: list[Villager]
    things: list[str]
    where: dict[str, str]
    holder: dict[str, str]
    lying: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """``Ada and the red kite``."""
        return f"{self.people[0].name} and the {self.things[0]}"

    @property
    def text(self) -> str:
        """The story in one paragraph."""
        return " ".join(self.sentences)

    def recap(self) -> list[str]:
        """Every fact that holds at the end, a sentence each."""
        places = [f"{name} is at the {place}." for name, place in self.where.items()]
        held = [f"{name} has the {thing}." for thing, name in self.holder.items()]
        return places + held + [f"The {thing} is at the {place}." for thing, place in self.lying.items()]


def make_scene(rng: Random, events: int) -> Scene:
    """A scene of two or three people and two things in which ``events`` things happen."""
    people = rng.sample(VILLAGERS, rng.choice((2, 2, 3)))
    things = [f"{colour} {thing}" for colour, thing in zip(rng.sample(COLOURS, 2), rng.sample(THINGS, 2), strict=True)]
    places = rng.sample(PLACES, len(people))
    scene = Scene(
        people,
        things,
        where={person.name: place for person, place in zip(people, places, strict=True)},
        holder={thing: person.name for thing, person in zip(things, people, strict=False)},
    )
    scene.sentences.append(f"It was a {rng.choice(WEATHER)} {rng.choice(DAYS)}.")
    for person, place in zip(people, places, strict=True):
        held = [thing for thing in things if scene.holder.get(thing) == person.name]
        scene.sentences.append(f"{person.name} was at the {place}" + "".join(f" with a {t}" for t in held) + ".")
    for _ in range(events):
        rng.choice(_possible(scene))(scene, rng)
    return scene


def _possible(scene: Scene) -> list:
    """The events that can happen now, the likelier ones twice."""
    present = set(scene.where.values())
    meeting = any(_company(scene, name) for name in scene.holder.values())
    findable = any(place in present for place in scene.lying.values())
    return [_move, _join, *[_give] * 3 * meeting, *[_find] * 2 * findable, *[_leave] * bool(scene.holder), _mood]


def _company(scene: Scene, name: str) -> list[Villager]:
    """The others at the place where ``name`` is."""
    return [other for other in scene.people if other.name != name and scene.where[other.name] == scene.where[name]]


def _walk(scene: Scene, rng: Random, person: Villager, place: str) -> None:
    scene.where[person.name] = place
    again = scene.sentences[-1].startswith(f"{person.name} ")
    subject = f"Then {person.pronoun}" if again else person.name
    scene.sentences.append(f"{subject} {rng.choice(MOVES)} to the {place}.")


def _move(scene: Scene, rng: Random) -> None:
    person = rng.choice(scene.people)
    _walk(scene, rng, person, rng.choice([place for place in PLACES if place != scene.where[person.name]]))


def _join(scene: Scene, rng: Random) -> None:
    person, other = rng.sample(scene.people, 2)
    if scene.where[person.name] != scene.where[other.name]:
        _walk(scene, rng, person, scene.where[other.name])
    else:
        _mood(scene, rng)


def _give(scene: Scene, rng: Random) -> None:
    thing = rng.choice([thing for thing, name in scene.holder.items() if _company(scene, name)])
    giver = scene.holder[thing]
    taker = rng.choice(_company(scene, giver)).name
    scene.holder[thing] = taker
    scene.sentences.append(f"{giver} gave the {thing} to {taker}.")


def _leave(scene: Scene, rng: Random) -> None:
    thing = rng.choice(list(scene.holder))
    person = scene.holder.pop(thing)
    scene.lying[thing] = scene.where[person]
    scene.sentences.append(f"{person} left the {thing} at the {scene.where[person]}.")


def _find(scene: Scene, rng: Random) -> None:
    finds = [
        (thing, name) for thing, spot in scene.lying.items() for name, place in scene.where.items() if spot == place
    ]
    thing, person = rng.choice(finds)
    del scene.lying[thing]
    scene.holder[thing] = person
    scene.sentences.append(f"{person} found the {thing}.")


def _mood(scene: Scene, rng: Random) -> None:
    scene.sentences.append(rng.choice(MOODS))


@dataclass(frozen=True)
class Count:
    """A story about a number of treats, and the sentence with the right number at its end."""

    name: str
    treats: str
    text: str
    answer: str


def make_count(rng: Random) -> Count:
    """Somebody has some treats, then gets or loses some, once or twice; never below one nor above twelve."""
    person, other = rng.sample(VILLAGERS, 2)
    single, plural = rng.choice(list(TREATS.items()))
    number = rng.randint(2, 8)
    sentences = [f"{person.name} had {amount(number, single, plural)}."]
    for _ in range(rng.choice((1, 1, 2))):
        change = rng.choice([step for step in (-3, -2, -1, 1, 2, 3) if 1 <= number + step <= 12])
        number += change
        few = NUMBERS[abs(change)]
        gained = (f"{other.name} gave {_him(person)} {few} more.", f"{capital(person.pronoun)} found {few} more.")
        lost = (f"{capital(person.pronoun)} lost {few}.", f"{capital(person.pronoun)} gave {few} to {other.name}.")
        sentences.append(rng.choice(gained if change > 0 else lost))
    answer = f"{person.name} has {amount(number, single, plural)}."
    return Count(person.name, plural, " ".join(sentences), answer)


def amount(number: int, single: str, plural: str) -> str:
    """``one plum``, ``two plums``."""
    return f"{NUMBERS[number]} {single if number == 1 else plural}"


def _him(person: Villager) -> str:
    return {"she": "her", "he": "him"}[person.pronoun]
