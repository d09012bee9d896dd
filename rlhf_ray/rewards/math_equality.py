r"""Are two answers the same mathematics? math-verify says so of expressions; what is made of them is compared here.

math-verify alone is lenient where a reward must not be: it takes the point `(2,1)` for the numbers `1,2`, `1,1` for
`1` and `3=5` for 5, and compares decimals to six places, however small they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify.parser import LatexExtractionConfig

_READ = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last", equations=False
    ),
)
_OPEN, _CLOSE = "([{", ")]}"
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
# What stands before an equals sign and names the value behind it: x, x_1, f(x), \theta, AB.
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?|'+)*(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?")
_MEMBER = re.compile(r"([A-Za-z])\s*\\in(?![A-Za-z])\s*")
_UNION = re.compile(r"\s*\\cup(?![A-Za-z])\s*")
# Digits in which two numbers must agree where one is not exact.
_DIGITS = 6


@dataclass(frozen=True)
class Parts:
    """An answer that is made of several: `(1, 2)` keeps its order and brackets, `\\{1, 2\\}` and `1, 2` have none."""

    elements: tuple[str, ...]
    brackets: str = ""
    braces: bool = False


class Equality:
    """Compares two answers in LaTeX, as `math_reading` leaves them. `seconds`: of each of math-verify's own calls."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self._parsed = lru_cache(maxsize=4096)(self._parse)  # every answer of a group is compared with the same one

    def equal(self, right: str, given: str) -> bool:
        right, given = _MEMBER.sub("", right), _MEMBER.sub("", given)
        ours, theirs = parts_of(right), parts_of(given)
        if ours is None and theirs is None:
            return self._single(right, given)
        if ours is None or theirs is None:
            return self._interval_and_relation(right, given)
        if bool(ours.brackets) != bool(theirs.brackets):
            # "1, 2" may name a point (1, 2), in its order; a set {1, 2} or an interval [1, 2] is something else.
            if ours.braces or theirs.braces or (ours.brackets or theirs.brackets) != "()":
                return False
            return self._in_order(ours.elements, theirs.elements)
        if ours.brackets:
            return ours.brackets == theirs.brackets and self._in_order(ours.elements, theirs.elements)
        return self._in_any_order(ours.elements, theirs.elements)

    def _in_order(self, right: Sequence[str], given: Sequence[str]) -> bool:
        return len(right) == len(given) and all(map(self.equal, right, given))

    def _in_any_order(self, right: Sequence[str], given: Sequence[str]) -> bool:
        """Each of ours is one of theirs, and none is left: `1, 1` is not `1`."""
        left = list(given)
        for ours in right:
            match = next((theirs for theirs in left if self.equal(ours, theirs)), None)
            if match is None:
                return False
            left.remove(match)
        return not left

    def _interval_and_relation(self, right: str, given: str) -> bool:
        r"""`(2, 5)` is `2 < x < 5`, and `A \cup B` is "in A or in B"; no other answer of several is one of one."""
        for union, several in ((right, given), (given, right)):
            pieces, parts = _UNION.split(union), parts_of(several)
            if len(pieces) > 1 and parts is not None and not parts.brackets and not parts.braces:
                return self._in_any_order(pieces, parts.elements)
        return any(re.search(r"[<>]|\\[lg]eq|\\cup", side) for side in (right, given)) and self._verified(right, given)

    def _single(self, right: str, given: str) -> bool:
        ours, theirs = _sides(right), _sides(given)
        names = [sides[0] if len(sides) > 1 and _NAME.fullmatch(sides[0]) else None for sides in (ours, theirs)]
        if len(ours) == 2 and len(theirs) == 2 and names[0] != names[1]:
            return self._verified(right, given)  # the same equation, written in another way
        if len(ours) > 1 and names[0] is None:
            return len(theirs) == len(ours) and self._verified(right, given)
        values = theirs[1:] if names[1] is not None else theirs
        if names[0] is not None and names[1] is not None and not self._verified(names[0], names[1]):
            return False
        # x = 5, and 2 + 3 = 5, are 5; 3 = 5 is not.
        return all(self._verified(ours[-1], value) for value in values)

    def _verified(self, right: str, given: str) -> bool:
        ours, theirs = self._parsed(right), self._parsed(given)
        if not ours or not theirs or _differ(ours[0], theirs[0]):
            return False
        return math_verify.verify(
            list(ours), list(theirs), float_rounding=_decimals(ours[0]), allow_set_relation_comp=True,
            timeout_seconds=self.seconds,
        )  # fmt: skip

    def _parse(self, latex: str) -> tuple[Any, ...]:
        if re.fullmatch(r"-?\d{1,100}", latex):
            return (sympy.Integer(latex),)  # without a grammar of LaTeX, which takes milliseconds
        found = math_verify.parse(
            f"\\boxed{{{latex}}}", extraction_config=[_READ], fallback_mode="no_fallback", parsing_timeout=self.seconds
        )
        return tuple(map(_with_imaginary_unit, found))


def parts_of(latex: str) -> Parts | None:
    r"""Its elements, with `a \pm b` as two of them; None for a single expression."""
    latex = latex.strip()
    sets = re.fullmatch(r"\\\{(.*)\\\}", latex, re.DOTALL)
    if sets and "\\}" not in sets[1]:
        elements = [signed for element in _split(sets[1]) for signed in _signs(element)]
        return Parts(tuple(elements), braces=True) if len(elements) > 1 else parts_of(elements[0]) if elements else None
    if latex[:1] in tuple("([") and _closes_at(latex) == len(latex) - 1:
        elements = _split(latex[1:-1])
        if len(elements) > 1:
            return Parts(tuple(elements), brackets=latex[0] + latex[-1])
        return None
    elements = [signed for element in _split(latex) for signed in _signs(element)]
    return Parts(tuple(elements)) if len(elements) > 1 else None


def _closes_at(latex: str) -> int:
    """Where the bracket that opens at 0 closes; an interval's may be of the other kind."""
    depth = 0
    for position, sign in enumerate(latex):
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if depth == 0:
            return position
    return -1


def _split(latex: str) -> list[str]:
    """At the commas and semicolons that stand outside of all brackets."""
    elements, depth = [""], 0
    for sign in latex:
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if sign in ",;" and depth == 0:
            elements.append("")
        else:
            elements[-1] += sign
    return [element.strip() for element in elements if element.strip()]


def _signs(element: str) -> list[str]:
    if "\\pm" not in element:
        return [element]
    plus, minus = element.replace("\\pm", "+").replace("\\mp", "-"), element.replace("\\pm", "-").replace("\\mp", "+")
    return [plus.removeprefix("+").strip(), minus]


def _sides(latex: str) -> list[str]:
    return [side.strip() for side in _EQUALS.split(latex) if side.strip()]


def _differ(ours: Any, theirs: Any) -> bool:
    """Two formulas that differ in number at one point are not equal: most wrong answers need no algebra."""
    if not all(isinstance(side, sympy.Expr) and not isinstance(side, sympy.Symbol) for side in (ours, theirs)):
        return False
    letters = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    point = {letter: sympy.Rational(7 * index + 9, 8) for index, letter in enumerate(letters)}
    try:
        a, b = (complex(side.subs(point).evalf(15)) for side in (ours, theirs))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return False  # a formula without a number, such as a relation
    return abs(a - b) > 1e-3 * max(abs(a), abs(b))


def _with_imaginary_unit(expression: Any) -> Any:
    """math-verify reads `i` as a variable like any other; (1 + i)^2 is 2i."""
    letters = {symbol: sympy.I for symbol in getattr(expression, "free_symbols", ()) if str(symbol) == "i"}
    return expression.subs(letters) if letters else expression


def _decimals(right: Any) -> int:
    """Decimal places to which numbers are compared: six digits of the right answer, also where it is small."""
    try:
        size = abs(float(right))
    except (TypeError, ValueError, OverflowError, AttributeError):
        return _DIGITS
    return _DIGITS if not 0 < size < 1 else _DIGITS - 1 - math.floor(math.log10(size))
