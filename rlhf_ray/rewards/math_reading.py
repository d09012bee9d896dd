r"""What a text says is its answer: where the answer stands, its unit, and whether it is mathematics or words.

The data's answer and a completion are read by this same rule, so that dollar signs, boxes, `\text{}`, units and blanks
make no difference on either side. Nothing here knows what the mathematics means (`math_equality.py` does).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from rlhf_ray.rewards.math_latex import plain_latex, without_delimiters

_FINAL_MARK = "####"  # how GSM8K marks its final answer
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_PHRASE = re.compile(
    r"\banswers?(?:\s+(?:to|for|of)\b[^.:=\n]{0,60})?\s*(?:\*\*)?\s*(?:is|are|[:：=])"
    r"|答案\s*(?:\*\*)?\s*(?:应该?|應該?)?(?:[是为為爲]|[:：=＝】]|(?=不是|并非|並非))\s*[:：]?(?:\s*[选選][项項])?"
    r"|(?:(?<![不能])[选選][择擇]?\s*[:：]?|正[确確][选選][项項]\s*[是为為爲:：])\s*"
    r"(?=[(（]?(?:[A-J]|(?-i:[A-J]{2,7}))[)）]?(?![A-Za-z的项項]))",
    re.IGNORECASE,
)
# Where the answer that follows such a phrase ends: a line, a sentence (a dot inside 3.5 or p.m. is none), a reason,
# what follows from it, what it is not.
_END = re.compile(
    r"\n|(?<!\b[ap]\.m)[.!?](?=\s|$)|[。！？；]"
    r"|,?\s+(?:because|since|so that|which)\b|,\s+(?:so|not|hence|thus|therefore)\b"
    r"|[,，]?\s*(?:因为|因為|由于|由於)|[,，]\s*(?:所以|因此|故|即|也就是|其余|其他|[而并]?不是|而非|並不是)",
    re.IGNORECASE,
)
_QUOTES = "“”「」『』【】"  # around an answer in a sentence; no mathematics is written with them
_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_HAN = "[\\u3040-\\u30ff\\u3400-\\u9fff]"
# Units are written behind a number without a blank in Chinese and Japanese; 1.2万 is 12000.
_CHINESE_UNIT = (
    r"(?:[十百千]?[万萬亿億])?"
    r"(?:(?:平方|立方)?(?:厘米|公分|毫米|分米|千米|公里|公尺|米)"
    r"(?:/(?:小时|时|分钟?|秒))?"
    r"|人民币|块钱?|美元|欧元|日元|元|円|千克|公斤|克|吨|毫升|升"
    r"|个?小时|分钟|秒钟?|天|年|岁|度|[个個人])?"
)
# 2024年5月1日, 3小时20分钟, 5元8角: one quantity, which is read as words.
_COMPOUND = r"(?:\d+(?:\.\d+)?(?:个?月|个?小时|分钟|秒钟|厘米|分米|千米|千克|[年日号天周时点秒元角分米克])){2,}"
_NUMBER = re.compile(
    rf"(?<![\d.]){_COMPOUND}|"
    r"(?<![A-Za-z\d_.:^])(?:百分之)?[-+]?(?:\\?[$€£¥₹]\s?)?[-+]?(?:"
    r"\d+\s\d+/\d+|\d+/\d+|\d{1,2}:\d\d|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?![\d^_])"
    rf"(?:\s?\\?%|{_CHINESE_UNIT})?"
)
_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg",
    "exp", "sqrt", "frac", "gcd", "lcm", "max", "min", "mod", "det", "deg", "dim", "ker", "lim", "pi", "or", "and",
))  # fmt: skip
# An answer in words that is longer than this is an explanation, which no completion can be equal to.
_MOST_WORDS = 10
# Characters of an answer. Where none is marked, it is looked for in so many at the end of the text.
_LONGEST = 2000

_QUANTITY = re.compile(
    r"(?P<number>(?=.*(?:\d|\\pi|\\sqrt|\\frac)).*[\w)}\]!])\s*(?P<unit>(?:\\text\{[^{}]*\}(?:\^\{?[23]\}?)?\s*)+)"
)
_SPELLED = re.compile(r"(?P<number>[-+]?[\d.,/:]*\d)(?P<blank>\s*)(?P<unit>[^\W\d_](?:[^\d\\=+*<>]|\^?[23](?!\d))*)")
# Behind a number these make no unit of what follows, but another statement.
_NO_UNIT = frozenset((
    "if", "for", "when", "where", "not", "is", "are", "or", "and", "but", "no", "maybe", "perhaps", "to", "than",
))  # fmt: skip
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_UNITS = {
    "dollar": "usd dollars 美元", "euro": "eur euros 欧元", "cent": "cents", "percent": "percentage pct",
    "yuan": "元 块 块钱 元钱 人民币 rmb", "degree": "degrees deg 度", "radian": "radians rad",
    "cm": "centimeter centimeters centimetre centimetres 厘米 公分", "dm": "分米",
    "mm": "millimeter millimeters millimetre millimetres 毫米", "m": "meter meters metre metres 米 公尺",
    "km": "kilometer kilometers kilometre kilometres 千米 公里", "in": "inch inches", "ft": "foot feet",
    "yd": "yard yards", "mi": "mile miles", "mph": "milesperhour mi/h", "m/s": "米/秒",
    "km/h": "kph kmh kilometersperhour 千米/时 千米/小时 公里/时 公里/小时", "s": "sec second seconds 秒 秒钟",
    "min": "minute minutes 分钟", "h": "hr hour hours hrs 小时 个小时", "g": "gram grams 克",
    "kg": "kilogram kilograms 千克 公斤", "t": "吨", "lb": "lbs pound pounds", "oz": "ounce ounces",
    "l": "liter liters litre litres 升", "ml": "milliliter milliliters 毫升", "pm": "p.m.", "am": "a.m.",
    "day": "days 天", "year": "years 年", "unit": "units",
}  # fmt: skip
_COUNTED = {"个", "個"}  # stands before the name of whatever is counted
_CANONICAL = {word: unit for unit, words in _UNITS.items() for word in (unit, *words.split())}


# (B) 12 cm: the letter of a multiple choice with its text, in which no other letter is named.
_CHOICE = re.compile(r"(?:\\text\{\s*)?(?:\(([A-J])\)|([A-J])[.):])\s*\}?(?!.*(?:\(\s*[A-J]\s*\)|\b[A-J][.)])).*")


@dataclass(frozen=True)
class Answer:
    """`latex`: without its unit, empty where there is none. `words`: equal only if the same; no mathematics."""

    latex: str
    unit: str = ""
    words: bool = False

    @property
    def number(self) -> Fraction | None:
        """Its exact value, of a decimal number alone."""
        return Fraction(self.latex) if re.fullmatch(r"[-+]?\d{1,200}(?:\.\d{1,200})?", self.latex) else None


def read_answer(text: str) -> Answer:
    """The answer that a text gives; `latex` is empty where it gives none."""
    # Runs of blanks, as a policy that has lost its way writes them, would cost the patterns the square of their length.
    found = final_part(re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text)))
    return _understood(found) if len(found) <= _LONGEST else Answer("")


def final_part(text: str) -> str:
    r"""Where the answer stands: the last box, else what follows the last `####`, else the last "the answer is".

    Else the whole text, where it is nothing but an answer; else the last formula or number in it. Empty where a last
    box is empty or was never closed: an answer that was cut off is none.
    """
    if boxes := list(_BOX.finditer(text)):
        return _argument(text, boxes[-1].end())
    _, mark, rest = text.rpartition(_FINAL_MARK)
    if mark:
        return rest.strip().partition("\n")[0].strip()
    if phrases := list(_PHRASE.finditer(text)):
        return _first_sentence(text[phrases[-1].end() :])
    return _alone(text.strip()[-_LONGEST:])


def _argument(text: str, start: int) -> str:
    """What stands in the braces that open at `start`; without braces the next word."""
    if not text.startswith("{", start):
        return re.match(r"[^\s$]*", text[start:]).group().rstrip(".,")
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            position += 1  # an escaped brace is none
        elif text[position] in "{}":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position].strip()
        position += 1
    return ""


def _first_sentence(rest: str) -> str:
    rest = rest.lstrip(" \t\n*_:：").removeprefix("that ")
    if display := re.match(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", rest, re.DOTALL):
        return (display.group(1) or display.group(2)).strip()
    end = _END.search(rest)
    return (rest[: end.start()] if end else rest).strip().strip(_QUOTES)


def _alone(text: str) -> str:
    if "\n" not in text and _is_nothing_but_an_answer(text):
        return text
    maths, numbers = list(_MATHS.finditer(text)), list(_NUMBER.finditer(text))
    if maths and (not numbers or numbers[-1].start() < maths[-1].end()):
        return next(group for group in maths[-1].groups() if group is not None).strip()
    if numbers:
        return numbers[-1].group().strip()
    return text if len(text.split()) <= _MOST_WORDS else ""


def _is_nothing_but_an_answer(text: str) -> bool:
    bare = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    words = [word for word in re.findall(r"(?<!\S)[^\W\d_]{2,}(?![^\s.,;:!?])", bare) if word.lower() not in _FUNCTIONS]
    scripts = re.search(rf"[^\W\d_A-Za-z]{{2,}}|{_HAN}", bare)  # Chinese words have no blanks around them
    if not words and not scripts:
        return True
    if not re.search(r"\d|[\\$=+^]", text):
        return len(text.split()) <= 5  # a name, "no solution"
    if not scripts and all(len(word) == 2 for word in words) and re.search(r"[=+*/^\\]", text):
        return True  # ab + 3: products of variables
    if not scripts and re.fullmatch(r"[^\W\d_]+ [^\s:=]+", text):
        return True  # Route 66
    if _NUMBER.fullmatch(text) or re.fullmatch(rf"[-+]?[\d.,]*\d\s?{_HAN}{{1,3}}", text):
        return True
    first, _, unit = text.partition(" ")
    return bool(_NUMBER.fullmatch(first)) and not re.search(r"\d", unit) and len(unit.split()) <= 3 or _is_date(text)


def _is_date(text: str) -> bool:
    month = r"[^\W\d_]{3,9}\.?"
    return bool(re.fullmatch(rf"{month} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?|\d{{1,2}} {month} \d{{4}}", text))


# ---- from the text of an answer to its parts ------------------------------------------------------------------


def _understood(text: str) -> Answer:
    latex = plain_latex(without_delimiters(text))
    latex = re.sub(r"^(?:\\text\{[^{}]*\}|[A-Za-z][A-Za-z ]{2,}[A-Za-z])\s*=\s*", "", latex)  # Area = 5
    latex = re.sub(r"^\\text\{\s*([-+]?\d[\d.,/]*\s*[^\W\d_][^{}\d]*)\}$", r"\1", latex)  # the number with its unit
    latex, unit = _without_unit(_without_ten_thousands(latex))
    if not latex:
        return Answer("")
    latex = re.sub(r"^([A-J])\s*[选選]?[项項]$", r"\1", latex)
    if choice := _CHOICE.fullmatch(latex):
        return Answer((choice[1] or choice[2]).lower(), words=True)
    latex = _REPEATING.sub(_as_fraction, latex)
    number = _as_decimal(latex)
    if number is not None:
        return Answer(number, unit)
    if _is_words(latex):
        return Answer(_as_words(latex), unit, words=True)
    return Answer(latex, unit)


def _without_ten_thousands(latex: str) -> str:
    """1.2万元 -> 12000元; 百分之25 -> 25%"""
    latex = re.sub(r"^百分之\s*([\d.]+)$", r"\1%", re.sub(r"\\text\{\s*([^\W\d_A-Za-z]+)\s*\}", r"\1", latex))
    found = re.fullmatch(r"([-+]?\d[\d,]{0,50}(?:\.\d{1,50})?)\s*([十百千]?)([万萬亿億])([^\d]*)", latex)
    if found is None:
        return latex
    times = {"": 1, "十": 10, "百": 100, "千": 1000}[found[2]] * (10**4 if found[3] in "万萬" else 10**8)
    value = Fraction(found[1].replace(",", "")) * times
    return f"{value}{found[4]}" if value.denominator == 1 else latex


def with_unit(answer: Answer, unit: str) -> Answer:
    """`5 h` is 5 times h, unless the other side shows that hours are meant."""
    found = re.fullmatch(r"([-+]?[\d.]+)\s*([a-z])(?:\^\{?([23])\}?)?", answer.latex)
    if unit and not answer.unit and found and _CANONICAL.get(found[2], found[2]) + (found[3] or "") == unit:
        return Answer(found[1], unit)
    return answer


def _without_unit(latex: str) -> tuple[str, str]:
    """(the rest, the unit's one name): `5\\text{ cm}`, `5 cm`, `\\$5`, `5%`, `90^\\circ`, `3:45 p.m.`"""
    for sign, unit in _CURRENCY.items():
        if sign in latex:
            return latex.replace(f"\\{sign}", "").replace(sign, "").strip(), unit
    if re.search(r"\d\s*\\?%$", latex) and "," not in latex:
        return re.sub(r"\s*\\?%$", "", latex), "percent"
    if "^\\circ" in latex and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", latex):
        scale = re.search(r"\^\\circ\s*(?:\\text\{\s*)?([CF])\b", latex)
        rest = re.sub(r"\^\\circ\s*(?:\\text\{\s*[CF]\s*\}|[CF]\b)?", "", latex).strip()
        return rest, f"degree{scale.group(1).lower()}" if scale else "degree"
    found = _QUANTITY.fullmatch(latex)
    if found and not _NO_UNIT & set(re.findall(r"[a-z]+", found["unit"].lower())):
        return found["number"].strip(), _name_of_unit(found["unit"])
    found = _SPELLED.fullmatch(latex)
    if found and not found["number"].endswith((",", ".")):
        word = re.sub(r"[^\w/]", "", found["unit"].split("^")[0].split()[0]).lower()
        # `5 eggs` has a unit; `5x`, `5 xy` and `2 sin x` are mathematics.
        known = word in _CANONICAL and len(word) > 1
        is_word = bool(found["blank"]) and len(word) > 2 or not word.isascii()
        if (known or is_word) and word not in _FUNCTIONS and not _NO_UNIT & set(found["unit"].lower().split()):
            return found["number"], _name_of_unit(found["unit"])
    return latex, ""


def _name_of_unit(text: str) -> str:
    r"""`\text{ square centimeters}`, `\text{cm}^2`, `cm^2` -> cm2"""
    words = re.sub(r"\\text|[{}.\s^()]", " ", text).lower().split()
    if words and words[0][:2] in ("平方", "立方"):
        return _name_of_unit(words[0][2:]) + ("2" if words[0].startswith("平方") else "3")
    if words and words[0] in _COUNTED:
        return ""
    power = "2" if {"square", "sq", "squared"} & set(words) else "3" if {"cubic", "cu", "cubed"} & set(words) else ""
    words = [word for word in words if word not in ("square", "sq", "squared", "cubic", "cu", "cubed", "of")]
    if words and words[-1] in ("2", "3"):
        power, words = words[-1], words[:-1]
    joined = "".join(words)
    name = _CANONICAL.get(joined) or "".join(_CANONICAL.get(word, word.removesuffix("s")) for word in words)
    return name + power


_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}")


def _as_fraction(found: re.Match) -> str:
    r"""0.1\overline{6} -> 16 - 1 over 90"""
    whole, fixed, again = found[1] or "0", found[2], found[3]
    value = Fraction(int(whole + fixed + again) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(again) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)


def _as_decimal(latex: str) -> str | None:
    """A number as digits and a dot, without separators of thousands and without an exponent."""
    if re.fullmatch(r"[-+]?\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?:\.\d+)?", latex):
        latex = re.sub(r"[, ]", "", latex)
    if found := re.fullmatch(r"([-+]?)(\d*)\.(\d+)|([-+]?)(\d+)\.?", latex):
        sign, whole, part = found[1] or found[4] or "", found[2] or found[5] or "0", found[3]
        return f"{sign.replace('+', '')}{whole}{f'.{part}' if part else ''}"
    if re.fullmatch(r"[-+]?\d{1,50}(?:\.\d{1,50})?[eE][-+]?\d{1,2}", latex):
        return format(Decimal(latex), "f")
    return None


def _is_words(latex: str) -> bool:
    if "\\text" in latex:
        return True
    if re.search(r"\d\s*:\s*\d|^\w+_\{?\d+\}?$|(?<![_^\d])\d+\s+\d", latex):
        return True  # a time or a ratio; a number in another base; digits that stand apart
    letters = re.sub(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[A-Za-z]+", " ", latex)
    words = [word for word in re.findall(r"[^\W\d_]+", letters) if word.lower() not in _FUNCTIONS]
    only_letters = re.fullmatch(r"[^\W\d_]+\)?|\([A-Za-z]\)|[^\W\d_]{2,}(?:(?:[ ,']+|-)[^\W\d_]+)+", latex)
    return bool(only_letters) or any(len(word) > 3 or not word.isascii() for word in words)


def _as_words(latex: str) -> str:
    """Without case, blanks, LaTeX's wrapping and what surrounds a letter of a multiple choice."""
    text = re.sub(r"\\text|\\\\|[{}\\\"'`]", "", latex).casefold()
    text = re.sub(r"\.(?!\d)", "", re.sub(r",\s*(\d{4})$", r" \1", text))
    if choice := re.fullmatch(r"\s*\(?\s*([a-z])\s*\)?\s*", text):
        return choice[1]
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)  # digits that stand apart stay apart
    return re.sub(r"\s", "", text).strip(",;:")
