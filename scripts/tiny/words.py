"""The words and the fixed facts of Pebble Cove, the village the tiny model knows."""

from random import Random
from typing import NamedTuple


class Villager(NamedTuple):
    """Someone of the village: ``she`` or ``he``, a trade, a home, an animal and a favourite colour."""

    name: str
    pronoun: str
    trade: str
    home: str
    animal: str
    colour: str


class Animal(NamedTuple):
    """A kind of animal; the tuple ``ANIMALS`` is in order of size."""

    name: str
    sound: str
    young: str
    home: str


VILLAGERS = (
    Villager("Ada", "she", "baker", "mill", "cat", "blue"),
    Villager("Ben", "he", "sailor", "harbour", "gull", "white"),
    Villager("Cleo", "she", "potter", "well", "goat", "brown"),
    Villager("Dan", "he", "farmer", "barn", "cow", "green"),
    Villager("Ema", "she", "teacher", "school", "frog", "yellow"),
    Villager("Finn", "he", "fisher", "beach", "duck", "grey"),
    Villager("Gus", "he", "smith", "bridge", "horse", "black"),
    Villager("Hana", "she", "weaver", "garden", "sheep", "red"),
    Villager("Ivo", "he", "tailor", "market", "mouse", "red"),
    Villager("Joy", "she", "singer", "tower", "hen", "yellow"),
    Villager("Kai", "he", "gardener", "orchard", "bee", "green"),
    Villager("Lena", "she", "doctor", "bridge", "dog", "white"),
    Villager("Milo", "he", "miller", "mill", "pig", "brown"),
    Villager("Nora", "she", "painter", "pond", "duck", "blue"),
    Villager("Otto", "he", "carpenter", "orchard", "dog", "black"),
    Villager("Pia", "she", "captain", "harbour", "cat", "grey"),
)
ANIMALS = (
    Animal("bee", "buzz", "grub", "in the hive"),
    Animal("frog", "croak", "tadpole", "in the pond"),
    Animal("mouse", "squeak", "pup", "in a hole"),
    Animal("gull", "screech", "chick", "on the cliff"),
    Animal("duck", "quack", "duckling", "in the reeds"),
    Animal("hen", "cluck", "chick", "in the coop"),
    Animal("cat", "meow", "kitten", "in the kitchen"),
    Animal("dog", "woof", "puppy", "in the kennel"),
    Animal("goat", "bleat", "kid", "on the hill"),
    Animal("sheep", "baa", "lamb", "in the meadow"),
    Animal("pig", "oink", "piglet", "in the sty"),
    Animal("cow", "moo", "calf", "in the barn"),
    Animal("horse", "neigh", "foal", "in the stable"),
    Animal("whale", "ooo", "calf", "in the sea"),
)
PLACES = (
    "mill",
    "pond",
    "barn",
    "harbour",
    "bridge",
    "garden",
    "market",
    "school",
    "well",
    "tower",
    "beach",
    "orchard",
)
THINGS = ("kite", "lamp", "rope", "drum", "basket", "book", "bell", "spoon", "hat", "key", "ball", "box", "cup", "flag")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
FRUITS = {"plum": "plums", "pear": "pears", "apple": "apples", "cherry": "cherries", "fig": "figs", "berry": "berries"}
TREATS = FRUITS | {"bun": "buns", "egg": "eggs", "nut": "nuts", "shell": "shells"}
TOOLS = ("hammer", "saw", "spade", "needle", "rake", "axe")
KINDS = {
    "animal": tuple(animal.name for animal in ANIMALS),
    "fruit": tuple(FRUITS),
    "tool": TOOLS,
    "colour": COLOURS,
    "place": PLACES,
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = ("windy", "sunny", "rainy", "foggy", "snowy", "cloudy")
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("long", "short"), ("old", "new"), ("wet", "dry"), ("full", "empty"),
    ("loud", "quiet"), ("fast", "slow"), ("clean", "dirty"), ("soft", "hard"), ("heavy", "light"), ("open", "closed"),
    ("happy", "sad"), ("early", "late"), ("near", "far"), ("high", "low"), ("sweet", "sour"), ("thick", "thin"),
    ("strong", "weak"), ("awake", "asleep"), ("deep", "shallow"), ("bright", "dark"),
)  # fmt: skip
# What can be said of a subject without nonsense: each pair goes with these.
DESCRIBED = {
    ("hot", "cold"): ("soup", "tea", "day"), ("big", "small"): ("boat", "house", "tree"),
    ("long", "short"): ("rope", "road", "song"), ("old", "new"): ("boat", "house", "hat"),
    ("wet", "dry"): ("coat", "sand", "grass"), ("full", "empty"): ("cup", "basket", "barn"),
    ("loud", "quiet"): ("song", "drum", "street"), ("fast", "slow"): ("boat", "horse", "river"),
    ("clean", "dirty"): ("coat", "spoon", "house"), ("soft", "hard"): ("bread", "bed", "bun"),
    ("heavy", "light"): ("box", "bell", "basket"), ("open", "closed"): ("door", "box", "gate"),
    ("happy", "sad"): ("song", "child", "story"), ("early", "late"): ("boat", "guest", "spring"),
    ("high", "low"): ("tower", "wall", "tide"), ("sweet", "sour"): ("plum", "apple", "tea"),
    ("thick", "thin"): ("rope", "book", "soup"), ("strong", "weak"): ("rope", "wind", "tea"),
    ("awake", "asleep"): ("cat", "child", "dog"), ("deep", "shallow"): ("pond", "well", "river"),
    ("bright", "dark"): ("room", "lamp", "night"),
}  # fmt: skip
# Present and past of what villagers do, and what may follow.
DEEDS = (
    ("walks", "walked", ("to the {place}", "along the beach", "home")),
    ("paints", "painted", ("the {thing}", "a {colour} boat", "the gate")),
    ("carries", "carried", ("the {thing}", "a {colour} box", "the bread")),
    ("sings", "sang", ("a long song", "to the {animal}", "at the {place}")),
    ("feeds", "fed", ("the {animal}", "the ducks", "the old horse")),
    ("finds", "found", ("a {colour} shell", "the {thing}", "a key")),
    ("makes", "made", ("a {colour} hat", "soup", "a new {thing}")),
    ("sees", "saw", ("a whale", "the {colour} boat", "the {animal}")),
    ("hides", "hid", ("the {thing}", "a nut", "in the {place}")),
    ("buys", "bought", ("a {colour} {thing}", "bread", "a pear")),
    ("washes", "washed", ("the {animal}", "the {colour} cup", "the {thing}")),
    ("waits", "waited", ("at the {place}", "for the boat", "for the rain")),
)


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    """The text with its first letter large."""
    return text[0].upper() + text[1:]


def join(words: list[str]) -> str:
    """``x, y and z``."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def deed(rng: Random) -> tuple[str, str]:
    """What somebody does, in the present and in the past: ``walks home``, ``walked home``."""
    present, past, endings = rng.choice(DEEDS)
    ending = rng.choice(endings).format(
        place=rng.choice(PLACES),
        thing=rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        animal=rng.choice(ANIMALS).name,
    )
    return f"{present} {ending}", f"{past} {ending}"
