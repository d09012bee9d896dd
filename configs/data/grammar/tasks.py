"""Instruction tasks in Alpaca's form (instruction, input, output); half of the kinds come without an input.

What has one right answer is computed here (sort, count, reverse, extract); the rest is put together from slots.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from draw import distinct, expand

_GROUPS = {
    "animal": ["heron", "otter", "badger", "donkey", "sparrow", "salmon", "hedgehog", "goose", "weasel", "camel"],
    "fruit": ["plum", "cherry", "fig", "apricot", "quince", "melon", "pear", "grape", "lemon", "mango"],
    "tool": ["hammer", "chisel", "wrench", "ladle", "rake", "saw", "drill", "anvil", "pliers", "trowel"],
    "colour": ["crimson", "amber", "violet", "scarlet", "turquoise", "beige", "indigo", "olive", "silver", "rose"],
    "instrument": ["cello", "flute", "bassoon", "drum", "harp", "oboe", "trumpet", "viola", "lute", "banjo"],
    "vehicle": ["tram", "ferry", "scooter", "lorry", "sledge", "canoe", "tractor", "glider", "barge", "bicycle"],
}
_OPPOSITES = {
    "early": "late", "heavy": "light", "narrow": "wide", "rough": "smooth", "bitter": "sweet", "shallow": "deep",
    "noisy": "quiet", "clumsy": "graceful", "scarce": "plentiful", "ancient": "modern", "dusty": "clean",
    "bold": "timid", "sharp": "blunt", "empty": "full", "loose": "tight", "cheap": "expensive",
}  # fmt: skip
_VERBS = {
    "bring": "brought", "choose": "chose", "draw": "drew", "fly": "flew", "grow": "grew", "hide": "hid", "keep": "kept",
    "lend": "lent", "ride": "rode", "sing": "sang", "swim": "swam", "teach": "taught", "throw": "threw", "wear": "wore",
}  # fmt: skip
_PEOPLE = ["Amara", "Benno", "Carla", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Luis"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_WORDS = [word for group in _GROUPS.values() for word in group]
_SENTENCES = {
    "subject": ["the old ferry", "a small brown dog", "our neighbour", "the night watchman", "the youngest pupil",
                "a man with a red umbrella", "the baker's daughter", "the tall clock"],
    "did": ["crossed the river", "waited by the gate", "lost a glove", "sang a quiet song", "stopped at noon",
            "found an old coin", "painted the fence", "missed the last bus"],
    "how": ["in the rain", "without a word", "before breakfast", "for the second time", "near the harbour",
            "on a cold morning"],
}  # fmt: skip
_TEXTS: dict[str, list[str]] = {
    "event": ["a birthday dinner", "a garden party", "a film evening", "a chess tournament", "a farewell lunch",
              "a reading at the library", "a day of planting trees"],
    "thing": ["the borrowed ladder", "the jar of honey", "the help with the move", "the book about birds",
              "the warm scarf", "the lift to the station", "the long talk"],
    "place": ["in the old mill", "at my flat", "in the town park", "behind the school", "on the roof terrace"],
    "person": _PEOPLE, "day": _DAYS, "hour": ["four", "five", "six", "seven", "eight"],
    "why": ["It came at just the right time.", "It made my week.", "I could not have done without it.",
            "I think of it every day."],
    "item": ["a kettle", "a pair of boots", "a lamp", "a backpack", "an alarm clock", "a rain coat", "a bicycle bell"],
    "good": ["light", "sturdy", "easy to clean", "quiet", "made to last", "simple", "kind to the hand"],
}  # fmt: skip

Task = tuple[str, str, str]


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(_WORDS, count)


def _sentence(rng: random.Random) -> str:
    return expand(rng, _SENTENCES, "{subject} {did} {how}.")


def _sort_words(rng: random.Random) -> Task:
    words = _words(rng, rng.randint(3, 5))
    return "Sort the words by the alphabet.", ", ".join(words), ", ".join(sorted(words))


def _sort_numbers(rng: random.Random) -> Task:
    numbers = rng.sample(range(1, 100), rng.randint(4, 6))
    way = rng.random() < 0.5
    told = "Sort the numbers from small to large." if way else "Sort the numbers from large to small."
    return told, " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers, reverse=not way)))


def _add_up(rng: random.Random) -> Task:
    numbers = [rng.randint(2, 30) for _ in range(3)]
    return "Add up the numbers.", ", ".join(map(str, numbers)), f"The sum is {sum(numbers)}."


def _count_words(rng: random.Random) -> Task:
    sentence = _sentence(rng)
    return "How many words has this sentence?", sentence, f"It has {len(sentence.split())} words."


def _upper_case(rng: random.Random) -> Task:
    sentence = _sentence(rng)
    return "Write the sentence in capital letters.", sentence, sentence.upper()


def _reverse(rng: random.Random) -> Task:
    words = _words(rng, 4)
    return "Turn the order of the words around.", " ".join(words), " ".join(reversed(words))


def _question(rng: random.Random) -> Task:
    subject, did = expand(rng, _SENTENCES, "{subject}|{did}").split("|")
    return "Who did it? Answer from the sentence.", f"{subject} {did}.", f"{subject}."


def _find_the_day(rng: random.Random) -> Task:
    person, day, hour = rng.choice(_PEOPLE), rng.choice(_DAYS), rng.choice(_TEXTS["hour"])
    told = f"Dear {person}, the meeting is now on {day} at {hour}, in the small room."
    return "On which day is the meeting?", told, f"The meeting is on {day}."


def _odd_one_out(rng: random.Random) -> Task:
    name, other = rng.sample(sorted(_GROUPS), 2)
    odd = rng.choice(_GROUPS[other])
    words = [*rng.sample(_GROUPS[name], 3), odd]
    rng.shuffle(words)
    told = "Which word does not belong to the others?"
    return told, ", ".join(words), f"{odd}: the others each name a kind of {name}."


def _group(rng: random.Random) -> Task:
    name = rng.choice(sorted(_GROUPS))
    word = rng.choice(_GROUPS[name])
    return "Is it an animal, a fruit, a tool, a colour, an instrument or a vehicle?", word, name.capitalize() + "."


def _opposite(rng: random.Random) -> Task:
    word = rng.choice(sorted(_OPPOSITES))
    return f"Give a word that means the opposite of '{word}'.", "", _OPPOSITES[word]


def _past(rng: random.Random) -> Task:
    verb = rng.choice(sorted(_VERBS))
    return f"What is the simple past of 'to {verb}'?", "", f"The simple past of 'to {verb}' is '{_VERBS[verb]}'."


def _three(rng: random.Random) -> Task:
    name = rng.choice(sorted(_GROUPS))
    chosen = rng.sample(_GROUPS[name], 3)
    told = f"Name three words for a kind of {name}, the first with the letter {chosen[0][0]}."
    return told, "", ", ".join(chosen) + "."


def _letters(rng: random.Random) -> Task:
    word = rng.choice(_WORDS)
    return f"How many letters has the word '{word}'?", "", f"The word '{word}' has {len(word)} letters."


def _spell(rng: random.Random) -> Task:
    word = rng.choice(_WORDS)
    return f"Spell the word '{word}', letter by letter.", "", "-".join(word)


def _next_number(rng: random.Random) -> Task:
    first, by = rng.randint(1, 30), rng.randint(2, 9)
    row = [first + by * i for i in range(4)]
    told = f"Which number comes next: {', '.join(map(str, row))}?"
    return told, "", f"The numbers grow by {by}, so the next one is {row[-1] + by}."


def _convert(rng: random.Random) -> Task:
    low, high, factor = rng.choice([
        ("metres", "kilometres", 1000), ("minutes", "hours", 60), ("grams", "kilograms", 1000), ("days", "weeks", 7),
        ("months", "years", 12),
    ])  # fmt: skip
    count = rng.randint(2, 12)
    return f"How many {low} are {count} {high}?", "", f"{count} {high} are {count * factor} {low}."


def _day_after(rng: random.Random) -> Task:
    day, later = rng.randrange(7), rng.randint(2, 6)
    told = f"Today is {_DAYS[day]}. Which day is it in {later} days?"
    return told, "", f"In {later} days it is {_DAYS[(day + later) % 7]}."


def _invitation(rng: random.Random) -> Task:
    event = rng.choice(_TEXTS["event"])
    said = f"Dear {{person}}, on {{day}} at {{hour}} there is {event} {{place}}. Please come, and bring a friend."
    return f"Write a short invitation to {event}.", "", expand(rng, _TEXTS, said)


def _thanks(rng: random.Random) -> Task:
    thing, person = rng.choice(_TEXTS["thing"]), rng.choice(_PEOPLE)
    said = expand(rng, _TEXTS, f"Dear {person}, thank you for {thing}. {{why}}")
    return f"Thank {person} for {thing} in two sentences.", "", said


def _advert(rng: random.Random) -> Task:
    item = rng.choice(_TEXTS["item"])
    said = expand(rng, _TEXTS, f"Here is {item} that is {{good}} and {{good}}.")
    return f"Praise {item} in one sentence.", "", said


_KINDS: list[Callable[[random.Random], Task]] = [
    _sort_words, _sort_numbers, _add_up, _count_words, _upper_case, _reverse, _question, _find_the_day, _odd_one_out,
    _group, _opposite, _past, _three, _letters, _spell, _next_number, _convert, _day_after, _invitation, _thanks,
    _advert,
]  # fmt: skip


def task(rng: random.Random) -> dict[str, str]:
    return dict(zip(("instruction", "input", "output"), rng.choice(_KINDS)(rng), strict=True))


def splits(count: int) -> dict[str, list[dict[str, str]]]:
    rng = random.Random("tasks")
    return {"tasks": distinct(lambda: task(rng), count, lambda row: (row["instruction"], row["input"]), set())}
