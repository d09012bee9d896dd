r"""One spelling of LaTeX: `\dfrac43`, `\frac 4 3` and `\frac{4}{3}` are the same text afterwards."""

from __future__ import annotations

import re

_LOOK_ALIKES = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ",
    "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "∅": r"\emptyset ",
    "（": "(", "）": ")", "［": "[", "］": "]", "｛": "{", "｝": "}", "，": ",", "：": ":", "％": "%", "＝": "=",
    "．": ".", "、": ",", "＋": "+", "－": "-", "／": "/", "＄": "$", "￥": "¥",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    **{chr(ord("０") + digit): str(digit) for digit in range(10)},
})  # fmt: skip

_SAME = [
    (r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])\s*", ""),
    (r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|rm|bf|operatorname)\s*\{", r"\\text{"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\le(?![A-Za-z])", r"\\leq"),
    (r"\\ge(?![A-Za-z])", r"\\geq"),
    (r"\\ne(?![A-Za-z])", r"\\neq"),
    (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset"),
    (r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\degree(?![A-Za-z])", r"^\\circ"),
    (r"(?:(?<![A-Za-z\\])m\s*)?\\(?:measured)?angle(?![A-Za-z])\s*", ""),
    # Blanks of every width. Between the digits of a number they, and a comma in braces, separate thousands.
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ )(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~", " "),
    # \text{5} is a number and \text{x} a variable, but behind a number a unit; what is longer is words.
    (r"\\text\{\s*([-+]?[\d.,]*\d)\s*\}", r"\1"),
    (r"(^|[^\d)}\]\s]\s*)\\text\{\s*([A-Za-z])\s*\}", r"\1\2"),
    (r"\\text\{\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])", ","),
    (r",(?:\s*,)+", ","),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"^(-?\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)i(?![A-Za-z])", " i"),
]
_SAME = [(re.compile(pattern), new) for pattern, new in _SAME]
_ARGUMENT = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[A-Za-z]+|\w)"
_FRACTION = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_ROOT = re.compile(r"\\sqrt\s*(\\[A-Za-z]+|\w)|√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|\w))")


def without_delimiters(text: str) -> str:
    r"""Without `$`, `$$`, `\(`, `\[` and Markdown's stars around it. A single dollar sign is a currency's."""
    text = text.strip().strip("`")
    text = re.sub(r"(?<!\\)\\[()\[\]]|\$\$|\*\*", "", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip()


def plain_latex(text: str) -> str:
    """The same mathematics in one spelling, without a dot or comma at its end."""
    text = text.translate(_LOOK_ALIKES)
    for pattern, new in _SAME:
        text = pattern.sub(new, text)
    text = _FRACTION.sub(lambda found: rf"\frac{_braced(found[1])}{_braced(found[2])}", text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[found.lastindex]}}}", text)
    text = re.sub(r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;").strip()


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else f"{{{argument}}}"
