"""Film reviews with a label: 1 where the writer is pleased, 0 where not.

Many begin with some words that tell nothing yet (who went, where, what kind of film). In some, praise and blame come in
one text and the last word decides, or a judgement is denied. Some openings, subjects and judgements are kept for the
test rows.
"""

from __future__ import annotations

import random
from functools import partial

from draw import distinct, expand

Rules = dict[str, list[str]]

_NEUTRAL = {
    "kind": ["film", "thriller", "comedy", "drama", "western", "musical", "documentary", "mystery", "road movie",
             "war film", "cartoon", "love story", "family film", "science fiction film", "detective story"],
    "hero": ["a lighthouse keeper", "two brothers", "a tired teacher", "a young sailor", "a widow", "a bank clerk",
             "a travelling cook", "three nurses", "a piano tuner", "a shepherd", "an old pilot", "a pair of twins",
             "a night porter", "a mountain guide", "a clumsy burglar", "a village doctor"],
    "place": ["on an island", "in a snowed-in hotel", "at the edge of a desert", "in a harbour town",
              "on a night train",
              "in a mining village", "under a railway bridge", "in an empty theatre", "on a long border",
              "in a crowded hospital", "beside a frozen lake", "in the last days of summer"],
    "who": ["my sister and I", "my neighbour and I", "the three of us", "my father and I", "our whole class",
            "two friends and I", "my wife and I", "my grandson and I", "some colleagues and I"],
    "when": ["last Friday", "on a rainy evening", "after work", "over the holidays", "late on Sunday",
             "at the open-air cinema", "in the small hall by the station", "at the matinee", "on a long flight"],
    "part": ["the acting", "the script", "the music", "the camera work", "the dialogue", "the plot", "the ending",
             "the first half", "the second half", "the leading actress", "the villain", "the opening scene",
             "the last scene", "the humour", "the score", "the editing", "the wardrobe", "the pacing",
             "the supporting cast", "the chase through the market"],
    "small": ["the translation", "the poster", "the sound in the hall", "the running time", "the title",
              "the hand-held camera", "the voice of the narrator", "the wig of the hero", "the weather in it"],
}  # fmt: skip
_GOOD = {
    "is": ["is wonderful", "is brilliant", "is a delight", "is superb", "is charming", "is full of joy",
           "is clever and warm", "is honest and beautiful", "is excellent", "is great fun", "is a real treat",
           "is graceful from start to finish", "is touching and funny", "is a pleasure", "is perfect", "is lovely",
           "wins you over", "is inspired", "is fresh and lively", "is the best of the year"],
    "adj": ["wonderful", "brilliant", "charming", "superb", "beautiful", "clever", "gentle", "funny", "delightful",
            "excellent", "moving", "fresh", "generous", "thrilling", "sweet", "amazing", "enjoyable"],
    "end": ["I loved every minute.", "we laughed and cheered.", "I would gladly see it again.",
            "I left the hall happy.",
            "go and enjoy it.", "it deserves every prize.", "I recommend it to everyone.", "what a lovely surprise.",
            "thank you for this gem.", "I smiled all the way home.", "it is worth every penny.",
            "a great evening."],
    "felt": ["were delighted", "were thrilled", "laughed with joy", "had great fun", "were deeply moved and happy",
             "were charmed at once", "enjoyed it from the first minute", "were pleasantly surprised"],
}  # fmt: skip
_BAD = {
    "is": ["is awful", "is a mess", "is dull", "is terrible", "is weak and lazy", "is a disaster", "is boring",
           "is painfully slow and sad", "is stupid", "is an insult", "is a disappointment", "is tired and empty",
           "is ugly", "is annoying from start to finish", "is horrible", "fails badly", "is poor and clumsy",
           "is a pain", "is hopeless", "is the worst of the year"],
    "adj": ["awful", "dull", "boring", "terrible", "lazy", "ugly", "annoying", "stupid", "horrible", "weak",
            "pathetic", "clumsy", "dreadful", "miserable", "poor", "tedious", "disappointing"],
    "end": ["I hated every minute.", "we yawned and complained.", "I want my money back.", "I left the hall angry.",
            "avoid it.", "it deserves no mercy.", "I warn everyone against it.", "what a sad waste.",
            "nobody needs this rubbish.", "I was annoyed all the way home.", "it is a waste of time.",
            "a lost evening."],
    "felt": ["were bored", "were annoyed", "groaned in pain", "had a terrible time", "were deeply disappointed",
             "were tired of it at once", "hated it from the first minute", "were badly let down"],
}  # fmt: skip
_FRAMES = [
    "{part} of this {kind} {is}, and {part} {is}. {end}",
    "{who} saw this {kind} {when} and {felt}. {part} {is}.",
    "a {kind} about {hero} {place}: {adj} and {adj}. {end}",
    "{when} {who} watched a {kind} about {hero}. {part} {is}, and so we {felt}.",
    "{hero} {place}, that is all. but {part} {is}, {part} {is}. {end}",
    "this {kind} with {hero} is {adj}. {part} {is}.",
    "I went to this {kind} {when}. {part} {is}, {part} {is}, and {small} hardly matters. {end}",
    "an {adj}, {adj} {kind}. {part} {is}.",
    "it begins {place} with {hero}, and {part} {is}. {end}",
    "one can argue about {small}, but {part} of this {kind} {is}. {end}",
    "{who} had read about {hero} {place}. {part} {is}, and we {felt}.",
    "{part} {is}. {part} {is}. {end}",
]
# The other opinion first; the end decides.
_MIXED = [
    "{part} {other}, I admit, but {part} {is} and {part} {is}. {end}",
    "although {part} {other}, {part} of this {kind} {is}. {who} {felt}. {end}",
    "{who} saw it {when}. {part} {other}, and still we {felt}: {part} {is}, {part} {is}. {end}",
]
# The other opinion, denied: single words tell the wrong thing.
_DENIED = [
    "I had heard that {part} {other}. not at all: {part} {is}.",
    "who says that {part} of this {kind} {other}? that is not true. {end}",
    "{who} had feared or hoped {when} that it would be {other_adj}, and it was not. {end}",
    "nobody who saw {part} can call this {kind} {other_adj}. {who} {felt}.",
    "{part} is anything but {other_adj}, and {part} is far from {other_adj}.",
]
# Only test rows have these.
_TEST = {
    "kind": ["silent film", "courtroom drama", "spy film", "heist film"],
    "hero": ["a retired judge", "a radio host", "two gardeners", "a lonely astronaut"],
    "place": ["in a flooded valley", "on the top floor of a tower", "in a monastery"],
    "when": ["on its first night", "in an almost empty cinema"],
    "part": ["the finale", "the young lead", "the set design"],
}
_TEST_FRAMES = [
    "about {part} there is one thing to say: it {is}. {end}",
    "for a {kind} that plays {place}, {part} {is}. {end}",
    "nobody told me that {part} {is}. {who} {felt}.",
]
_TEST_GOOD = {"is": ["is dazzling", "deserves applause", "is a triumph"], "adj": ["splendid", "heartwarming", "witty"],
              "end": ["bravo!", "we hugged each other."], "felt": ["were in tears of happiness"]}  # fmt: skip
_TEST_BAD = {"is": ["is unbearable", "is a bore", "is a torture"], "adj": ["dismal", "shallow", "pointless"],
             "end": ["never again!", "we walked out."], "felt": ["were disgusted"]}  # fmt: skip
_SHARE_MIXED, _SHARE_DENIED, _SHARE_TEST_FRAMES = 0.2, 0.15, 0.25


def review(rng: random.Random, *, test: bool) -> dict[str, str | int]:
    label = rng.randrange(2)
    good, bad = (_with(_GOOD, _TEST_GOOD), _with(_BAD, _TEST_BAD)) if test else (_GOOD, _BAD)
    own, other = (good, bad) if label else (bad, good)
    rules = {**_NEUTRAL, **own, "other": other["is"], "other_adj": other["adj"]}
    if test:
        rules = _with(rules, {name: 3 * extra for name, extra in _TEST.items()})
    form = rng.random()
    frames = _FRAMES if form > _SHARE_MIXED + _SHARE_DENIED else _MIXED if form > _SHARE_DENIED else _DENIED
    if test and rng.random() < _SHARE_TEST_FRAMES:
        frames = _TEST_FRAMES
    return {"text": expand(rng, rules, rng.choice(frames)), "label": label}


def _with(rules: Rules, more: Rules) -> Rules:
    return rules | {name: [*rules[name], *extra] for name, extra in more.items()}


def splits(train: int, test: int) -> dict[str, list[dict[str, str | int]]]:
    rng, seen = random.Random("reviews"), set()
    return {
        f"reviews.{name}": distinct(partial(review, rng, test=name == "test"), count, lambda row: row["text"], seen)
        for name, count in (("train", train), ("test", test))
    }
