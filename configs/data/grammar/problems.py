"""Word problems in GSM8K's form: steps with their arithmetic in <<...>>, and `#### n` at the end.

A kind of problem is a function that draws its numbers and returns (question, steps, result). Three kinds are kept for
the test rows, and numbers there are a little larger.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from draw import distinct

_NAMES = ["Ada", "Bruno", "Chen", "Dilara", "Emeka", "Fatou", "Goran", "Hanne", "Ivo", "Jamila", "Kofi", "Lena",
          "Mateo", "Noor", "Olek", "Pia", "Rafi", "Sanna", "Tariq", "Ulla", "Vera", "Wim", "Yuki", "Zoe"]  # fmt: skip
_THINGS = ["pencils", "marbles", "stickers", "buttons", "postcards", "seashells", "beads", "stamps", "badges", "bolts",
           "candles", "corks"]  # fmt: skip
_FOODS = ["apples", "pears", "plums", "eggs", "buns", "lemons", "tomatoes", "onions", "figs", "rolls"]
_SHOPS = ["at the market", "in the corner shop", "at the school fair", "at a stall by the river", "in the museum shop"]

Problem = tuple[str, list[str], int]


class _Draw:
    """Numbers and words of one problem. `big` is what numbers are scaled by."""

    def __init__(self, rng: random.Random, big: int):
        self._rng, self._big = rng, big
        self.a, self.b = rng.sample(_NAMES, 2)
        self.thing, self.food, self.shop = rng.choice(_THINGS), rng.choice(_FOODS), rng.choice(_SHOPS)

    def number(self, low: int, high: int) -> int:
        return self._rng.randint(low, high * self._big)


def step(expression: str) -> str:
    """`3*4` as `3*4 = <<3*4=12>>12`; only whole results."""
    value = eval(expression, {"__builtins__": {}})  # of numbers that this file has put together
    if value != int(value):
        raise ValueError(f"{expression} is no whole number")
    return f"{expression} = <<{expression}={int(value)}>>{int(value)}"


def _gives_away(d: _Draw) -> Problem:
    start, given, found = d.number(20, 60), d.number(3, 18), d.number(2, 15)
    left = start - given
    return (
        f"{d.a} has {start} {d.thing}. {d.a} gives {given} of them to {d.b} and then finds {found} more. "
        f"How many {d.thing} does {d.a} have now?",
        [f"After giving some away {d.a} has {step(f'{start}-{given}')} {d.thing}.",
         f"With those that were found there are {step(f'{left}+{found}')} {d.thing}."],
        left + found,
    )  # fmt: skip


def _boxes(d: _Draw) -> Problem:
    boxes, each, broken = d.number(3, 9), d.number(4, 12), d.number(2, 5)
    return (
        f"{d.a} carries {boxes} boxes with {each} {d.food} in each. On the way {broken} {d.food} are crushed. "
        f"How many {d.food} arrive whole?",
        [f"The boxes hold {step(f'{boxes}*{each}')} {d.food}.",
         f"{step(f'{boxes * each}-{broken}')} {d.food} arrive whole."],
        boxes * each - broken,
    )  # fmt: skip


def _change(d: _Draw) -> Problem:
    count, price = d.number(2, 8), d.number(2, 6)
    cost = count * price
    paid = (cost // 10 + 1) * 10
    return (
        f"{d.a} buys {count} {d.food} {d.shop} for ${price} each and pays with ${paid}. "
        f"How many dollars does {d.a} get back?",
        [f"The {d.food} cost {step(f'{count}*{price}')} dollars.",
         f"{d.a} gets back {step(f'{paid}-{cost}')} dollars."],
        paid - cost,
    )


def _shares(d: _Draw) -> Problem:
    friends, each, own = d.number(3, 8), d.number(3, 9), d.number(2, 7)
    total = friends * each + own
    return (
        f"{d.a} has {total} {d.thing}, keeps {own} of them, and shares the rest equally among {friends} friends. "
        f"How many {d.thing} does each friend get?",
        [f"There are {step(f'{total}-{own}')} {d.thing} to share.",
         f"Each friend gets {step(f'{total - own}/{friends}')} {d.thing}."],
        each,
    )  # fmt: skip


def _twice_as_many(d: _Draw) -> Problem:
    one, times, more = d.number(4, 15), d.number(2, 4), d.number(1, 9)
    other = one * times
    return (
        f"{d.a} has {one} {d.thing}. {d.b} has {times} times as many and then gets {more} more. "
        f"How many {d.thing} do they have together?",
        [f"At first {d.b} has {step(f'{one}*{times}')} {d.thing}.", f"Then {d.b} has {step(f'{other}+{more}')}.",
         f"Together they have {step(f'{one}+{other + more}')} {d.thing}."],
        one + other + more,
    )  # fmt: skip


def _wages(d: _Draw) -> Problem:
    hours, days, pay = d.number(2, 6), d.number(2, 5), d.number(8, 15)
    return (
        f"{d.a} works {hours} hours a day on {days} days of the week and earns ${pay} an hour. "
        f"How many dollars does {d.a} earn in a week?",
        [f"{d.a} works {step(f'{hours}*{days}')} hours a week.",
         f"That earns {step(f'{hours * days}*{pay}')} dollars."],
        hours * days * pay,
    )


def _reading(d: _Draw) -> Problem:
    a_day, days, left = d.number(8, 20), d.number(3, 7), d.number(10, 60)
    pages = a_day * days + left
    return (
        f"A book has {pages} pages. {d.a} reads {a_day} pages a day. How many pages are left after {days} days?",
        [f"In {days} days {d.a} reads {step(f'{a_day}*{days}')} pages.",
         f"{step(f'{pages}-{a_day * days}')} are left."],
        left,
    )


def _rows_of_chairs(d: _Draw) -> Problem:
    rows, chairs, absent = d.number(4, 9), d.number(5, 12), d.number(2, 9)
    return (
        f"A hall has {rows} rows of {chairs} chairs. At a concert {absent} chairs stay empty. How many people sit?",
        [f"There are {step(f'{rows}*{chairs}')} chairs.", f"{step(f'{rows * chairs}-{absent}')} people sit."],
        rows * chairs - absent,
    )


def _half(d: _Draw) -> Problem:
    half, more = d.number(6, 20), d.number(2, 9)
    return (
        f"{d.a} bakes {2 * half} {d.food if d.food in ('buns', 'rolls') else 'buns'} and sells half of them in the "
        f"morning and {min(more, half)} more after noon. How many are left?",
        [f"In the morning {d.a} sells {step(f'{2 * half}/2')}, so as many are left.",
         f"After noon {step(f'{half}-{min(more, half)}')} are left."],
        half - min(more, half),
    )  # fmt: skip


def _two_prices(d: _Draw) -> Problem:
    adults, children, price, low = d.number(2, 5), d.number(1, 6), d.number(7, 12), d.number(3, 6)
    return (
        f"A ticket costs ${price} for an adult and ${low} for a child. What do {adults} adults and {children} "
        f"{'child' if children == 1 else 'children'} pay together, in dollars?",
        [f"The adults pay {step(f'{adults}*{price}')} dollars.",
         f"The children pay {step(f'{children}*{low}')} dollars.",
         f"Together that is {step(f'{adults * price}+{children * low}')} dollars."],
        adults * price + children * low,
    )  # fmt: skip


def _saving(d: _Draw) -> Problem:
    weekly, weeks, had = d.number(4, 12), d.number(3, 9), d.number(5, 30)
    price = had + weekly * weeks
    return (
        f"{d.a} wants a lamp for ${price} and has ${had}. {d.a} saves ${weekly} a week. How many weeks does it take?",
        [f"{step(f'{price}-{had}')} dollars are missing.", f"It takes {step(f'{weekly * weeks}/{weekly}')} weeks."],
        weeks,
    )


def _garden(d: _Draw) -> Problem:
    length, width = d.number(5, 14), d.number(3, 9)
    return (
        f"A garden is {length} metres long and {width} metres wide. {d.a} walks around it twice. How many metres is "
        "that?",
        [f"Length and width are {step(f'{length}+{width}')} metres.",
         f"Once around is {step(f'2*{length + width}')} metres.",
         f"Twice around is {step(f'2*{2 * (length + width)}')} metres."],
        4 * (length + width),
    )  # fmt: skip


def _bus(d: _Draw) -> Problem:
    on, off, new, last = d.number(12, 30), d.number(3, 9), d.number(2, 9), d.number(1, 3)
    off = min(off, on - 1)
    stay = on - off + new
    last = min(last, stay)
    return (
        f"A bus starts with {on} people. At the first stop {off} get off and {new} get on, at the second {last} get "
        "off. How many people are on the bus then?",
        [f"After the first stop there are {step(f'{on}-{off}+{new}')} people.",
         f"Then there are {step(f'{stay}-{last}')}."],
        stay - last,
    )


def _ages(d: _Draw) -> Problem:
    young, gap, years = d.number(4, 12), d.number(2, 9), d.number(2, 8)
    return (
        f"{d.a} is {young} years old and {d.b} is {gap} years older. How old will {d.b} be in {years} years?",
        [f"Now {d.b} is {step(f'{young}+{gap}')}.",
         f"In {years} years {d.b} will be {step(f'{young + gap}+{years}')}."],
        young + gap + years,
    )


def _tank(d: _Draw) -> Problem:
    per_minute, minutes, leak = d.number(6, 15), d.number(4, 9), d.number(1, 4)
    return (
        f"A pipe fills a tank with {per_minute} litres a minute, and {leak} litres a minute leak out. How many litres "
        f"are in the tank after {minutes} minutes, if it was empty?",
        [f"Each minute {step(f'{per_minute}-{leak}')} litres stay.",
         f"After {minutes} minutes there are {step(f'{per_minute - leak}*{minutes}')} litres."],
        (per_minute - leak) * minutes,
    )  # fmt: skip


def _train(d: _Draw) -> Problem:
    first, hours, second = d.number(40, 80), d.number(2, 5), d.number(30, 90)
    return (
        f"A train goes {first} kilometres an hour for {hours} hours and then {second} kilometres more. How far does it "
        "go in all, in kilometres?",
        [f"At first it goes {step(f'{first}*{hours}')} kilometres.",
         f"In all it goes {step(f'{first * hours}+{second}')} kilometres."],
        first * hours + second,
    )  # fmt: skip


_KINDS: list[Callable[[_Draw], Problem]] = [
    _gives_away, _boxes, _change, _shares, _twice_as_many, _wages, _reading, _rows_of_chairs, _half, _two_prices,
    _saving, _garden, _bus,
]  # fmt: skip
_TEST_KINDS = [_ages, _tank, _train]


def problem(rng: random.Random, *, test: bool) -> dict[str, str]:
    kind = rng.choice([*_KINDS, *_TEST_KINDS] if test else _KINDS)
    question, steps, result = kind(_Draw(rng, 2 if test else 1))
    return {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


def splits(train: int, test: int) -> dict[str, list[dict[str, Any]]]:
    rng, seen = random.Random("problems"), set()
    return {
        f"problems.{name}": distinct(
            partial(problem, rng, test=name == "test"), count, lambda row: row["question"], seen
        )
        for name, count in (("train", train), ("test", test))
    }
