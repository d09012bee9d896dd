"""Personal data in texts: mail addresses, telephone, card, identity and bank account numbers, found and masked.

A number counts only where it is one: cards by Luhn's check digit and an issuer's prefix, Chinese identity numbers by
ISO 7064 (mod 11-2) and their date of birth, US social security numbers by their form and what was ever issued, bank
accounts by ISO 13616 (mod 97) and their country's length, telephone numbers by the Chinese forms and by Google's
metadata (phonenumbers). So years, sums and long decimals stay. Telephone numbers without a country's code are read as
US or Chinese ones only. Names, postal addresses and other countries' identity numbers are not looked for: this finds
what can be told from other text by itself, and is no proof that a text has nothing else.
"""

from __future__ import annotations

import bisect
import datetime
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.data.rows import Row, placed
from rlhf_ray.errors import ConfigError, DataError

EMAIL, PHONE, CARD, IDENTITY, ACCOUNT = "email", "phone", "card", "identity number", "bank account"
MASKS = {EMAIL: "[EMAIL]", PHONE: "[PHONE]", CARD: "[CARD]", IDENTITY: "[ID]", ACCOUNT: "[IBAN]"}

# Written without a country code, a number is read as one of these regions, or by the Chinese forms below.
REGIONS = ("US",)

_Span = tuple[int, int]
# Full-width forms, the digits of Arabic, Persian, Hindi and Thai, other hyphens and other blanks of one line: one
# character for one, so that places stay.
# Full-width brackets and commas stay: they are punctuation, where `k.sum(` is code and `1,234` one number.
_PLAIN = {0xFF01 + offset: 0x21 + offset for offset in range(94) if chr(0x21 + offset) not in "()[],"}
_PLAIN |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013"), ord("-"))
_PLAIN |= dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u3000"), ord(" "))
_PLAIN |= {zero + digit: 0x30 + digit for zero in (0x660, 0x6F0, 0x966, 0xE50) for digit in range(10)}
# The escapes of JSON and of most languages: the n of `hi\nbob@example.com` is no part of the address.
_ESCAPE = re.compile(r'\\+(?:u[0-9A-Fa-f]{4}|["/bfnrt])?')
_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|-?\d[\d.eE+-]*|[{}\[\]]', re.DOTALL)
# Lengths bound every repetition: no text makes the search take more than linear time.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})"
    r"(?![A-Za-z0-9])"
)
# `q@k.transpose(1, 2)` and `x@self.net(y)` are code: before an ASCII bracket a domain must look like one.
_DOMAIN_BEFORE_BRACKET = re.compile(
    r"(?!(?:self|cls|this)\.).*\.(?:com|org|net|edu|gov|cn|hk|tw|jp|kr|sg|uk|de|fr|ru|nl|eu|au|ca|br|es|pl|ch)", re.I
)
# A comma before three digits groups thousands, one after a single digit is a decimal comma; others divide a list.
_BEFORE = r"(?<![0-9A-Za-z_])(?<!\d\.)(?<!(?<!\d)\d,)"
_AFTER = r"(?![0-9A-Za-z_])(?!\.\d)(?!,\d{3}(?!\d))"
_CARD = re.compile(
    rf"{_BEFORE}(?:\d{{13,19}}|\d{{4}}([ -])\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?|\d{{4}}([ -])\d{{6}}\2\d{{4,5}})"
    + _AFTER
)
# Visa, Mastercard, American Express, Discover, UnionPay, JCB, Diners Club: prefix and lengths.
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"
)
_CHINESE_ID = re.compile(rf"{_BEFORE}[1-9]\d{{16}}[\dXx]{_AFTER}")
_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])(?!\.\d)")
_IBAN = re.compile(
    r"(?<![0-9A-Za-z])(?:[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}"
    # In lower case, or with hyphens: in one, or in fours.
    r"|[A-Za-z]{2}\d{2}(?:[A-Za-z0-9]{11,30}|([ -])[A-Za-z0-9]{4}(?:\1[A-Za-z0-9]{4}){1,6}(?:\1[A-Za-z0-9]{1,3})?))"
)
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA",
        30: "JO KW MU", 31: "MT SC", 32: "LC",
    }.items()
    for country in countries.split()
}  # fmt: skip
# In China the area code of a landline stands in brackets, or before a hyphen or a blank, and an extension may follow;
# mobile numbers are mostly written in one, and service numbers (400, 800) with hyphens.
_CHINESE_PHONE = re.compile(
    rf"(?:{_BEFORE}(?:(?:\+|00)?86[ -]?)?"
    r"(?:1[3-9]\d(?:([ .-]?)\d{4}\1\d{4}|-\d{8})|0(?:10|2\d|[3-9]\d{2})[ -][2-8]\d{2,3}[ -]?\d{4}(?:-\d{1,5})?"
    r"|[48]00-(?:\d{3}-?\d{4}|\d{4}-\d{3}))"
    r"|(?<![0-9A-Za-z_])[(（]0(?:10|2\d|[3-9]\d{2})[)）][ -]?[2-8]\d{2,3}[ -]?\d{4}(?:-\d{1,5})?)" + _AFTER
)
_SEVEN_DIGITS = re.compile(r"\d(?:[^\w,=*/]{0,3}\d){6}")
# A sum stands on one line, and beside its operator stands another number, a variable or a bracket. So the points of a
# list, `**bold**`, `<b>`, `tel1=` and `(home) / ` are none.
_OPERATOR_BEFORE = re.compile(r"(?:[\d)\]}][^\S\n]*[-=+*/^×÷<>≈−]|[$¥￥€£])[^\S\n]*$")
_NO_OPERATOR_BEFORE = re.compile(
    r"(?:</?[A-Za-z][^<>]*>|(?<![A-Za-z_])[A-Za-z_]{2,}\d*(?:\[\w*\])?[^\S\n]*=|\([^\W\d]{2,}[^()\d]*\)[^\S\n]*[-/])[^\S\n]*$"
)
_OPERAND = r"[^\S\n]*[-+−]?(?:[\d.(\[{$¥￥€£√\\]|[A-Za-z](?![A-Za-z@.]))"
_OPERATOR_AFTER = re.compile(
    rf"[^\S\n]*(?:[=×÷≈%]|元|[-−][^\S\n]*\d|(?:[/^>]|<(?!/?[A-Za-z][^<>\n]*>)){_OPERAND})"
    rf"|(?:\+|\*\*?)(?!\s){_OPERAND}|[^\S\n]+(?:\+|\*\*?)[^\S\n]{_OPERAND}"
)
_IN_ANGLES = re.compile(r"<[^<>\s]*$")
# `13812345678=张三` names somebody: after the sign stand a few letters and no operator.
_NAME_AFTER = re.compile(
    r"\s?=\s?(?:[\u4e00-\u9fff]{2,4}|[A-Z][a-z]+)(?![\u4e00-\u9fffA-Za-z0-9]|\s*[-=+*/^×÷<>≈%−(_])"
)
# `13812345678/13912345678`: two numbers with a stroke between them.
_STROKE_BEFORE = re.compile(r"(?<![\d.+*^=])(\+?[\d(（](?:[ ().（）-]{0,2}\d){6,18})\s?/\s?$")
_STROKE_AFTER = re.compile(r"\s?/\s?(\+?[\d(（](?:[ ().（）-]{0,2}\d){6,18})(?!\d|\s*[-=+*/^×÷<>≈%−])")


@dataclass(frozen=True)
class Personal:
    """text[start:end] is of a kind of MASKS."""

    kind: str
    start: int
    end: int


def find_personal(text: str) -> list[Personal]:
    """All there is in a text, in its order; no two overlap.

    Raises:
        ConfigError: the package phonenumbers is not installed.
    """
    found: list[Personal] = []
    text = text if text.isascii() else text.translate(_PLAIN)
    text = _ESCAPE.sub(lambda escape: " " * len(escape[0]), text) if "\\" in text else text
    for kind, finder in _FINDERS:
        for start, end in finder(text):
            at = bisect.bisect(found, start, key=lambda item: item.start)
            is_free = (at == 0 or found[at - 1].end <= start) and (at == len(found) or end <= found[at].start)
            if is_free:
                found.insert(at, Personal(kind, start, end))
    return found


def masked(text: str, found: Sequence[Personal] | None = None) -> str:
    """`text` with [EMAIL], [PHONE] and so on in place of what was found."""
    pieces, at = [], 0
    for item in find_personal(text) if found is None else found:
        pieces += [text[at : item.start], MASKS[item.kind]]
        at = item.end
    return "".join(pieces) + text[at:]


def shape(text: str) -> str:
    """What a personal datum looks like, for people to judge: all but its first character is hidden."""
    return text[:1] + re.sub(r"[^\W_]", "*", text[1:])


class PersonalData:
    """What is done about it in the rows of a source: none, count, or mask; `counts` says what was found, by kind."""

    def __init__(self, mode: Literal["none", "count", "mask"]):
        self._mode = mode
        self.counts: Counter[str] = Counter()

    def seen(self, row: Row) -> Row:
        """The row as it is to be used: all its columns, for any of them may reach a prompt or a reward.

        Raises DataError that names the row if it is nested too deeply to be looked through.
        """
        if self._mode == "none":
            return row
        with placed(row.where):
            fields = masked_row(row.fields, lambda kind, _: self.counts.update((kind,)))
        return Row(fields, row.where) if self._mode == "mask" else row


# Is told the kind and the text of each personal datum.
OnFound = Callable[[str, str], None]


def masked_row(fields: Mapping[str, Any], on_found: OnFound) -> dict[str, Any]:
    """A row's columns with all that is personal masked, at every depth; the columns keep their names.

    Raises DataError, without a place, for what is nested too deeply.
    """
    try:
        return {name: masked_value(value, on_found) for name, value in fields.items()}
    except RecursionError as error:
        raise DataError("is nested too deeply to be looked through for personal data; flatten it") from error


def masked_value(value: Any, on_found: OnFound) -> Any:
    """A value with its strings, its numbers and the keys of its objects masked.

    A number that is personal becomes a string. In a string that is the JSON text of an object or a list, what it
    says is masked, and the rest of it stays as it is written. Keys that would be equal once masked are numbered.
    """
    if isinstance(value, str):
        return _masked_json(value, on_found) if _is_json(value) else _masked_text(value, on_found)
    if isinstance(value, (int, float)):
        return _masked_number(value, on_found)
    if isinstance(value, Mapping):
        copied: dict[Any, Any] = {}
        new_keys = _NewKeys(value)
        for key, inner in value.items():
            name = _masked_text(key, on_found) if isinstance(key, str) else key
            copied[key if name == key else new_keys.free(name)] = masked_value(inner, on_found)
        return copied
    return [masked_value(inner, on_found) for inner in value] if isinstance(value, (list, tuple)) else value


def _masked_text(text: str, on_found: OnFound) -> str:
    found = find_personal(text)
    for item in found:
        on_found(item.kind, text[item.start : item.end])
    return masked(text, found)


def _masked_number(number: float, on_found: OnFound) -> Any:
    """The mask, where all digits of a number are a personal datum. Tables with gaps hold whole numbers as floats."""
    if isinstance(number, bool) or not 0 < number < 10**19 or number != int(number):
        return number
    text = str(int(number))
    found = find_personal(text)
    if [(item.start, item.end) for item in found] != [(0, len(text))]:
        return number
    return _masked_text(text, on_found)


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # a number of more digits than Python reads is a ValueError too
        return False
    return True


def _masked_json(text: str, on_found: OnFound) -> str:
    """JSON text that stays JSON: each string and number is read, masked, and written again if that changes it."""
    own = {json.loads(match[1]) for match in _JSON_TOKEN.finditer(text) if match[2]}
    open_ones: list[_NewKeys] = []  # one for each object and list around a place

    def rewritten(match: re.Match[str]) -> str:
        if match[0] in "{[":
            open_ones.append(_NewKeys(own))
            return match[0]
        if match[0] in "}]":
            open_ones.pop()
            return match[0]
        written, colon = match[1] or match[0], match[2] or ""
        value = json.loads(written)
        hidden = _masked_text(value, on_found) if colon else masked_value(value, on_found)
        if hidden == value:
            return match[0]
        if colon:
            hidden = open_ones[-1].free(hidden)
        # Half of a surrogate pair can only be written as an escape.
        return json.dumps(hidden, ensure_ascii=written.isascii() or "\\ud" in written.lower()) + colon

    return _JSON_TOKEN.sub(rewritten, text)


class _NewKeys:
    """Keys of one object in place of those that are masked: `key`, `key 2`, `key 3` ..., none given twice.

    `own`: the keys that are there already, and stay.
    """

    def __init__(self, own: Collection[Any]):
        self._own = own
        self._given: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def free(self, key: str) -> str:
        name = key
        while name in self._own or name in self._given or not self._numbers[key]:
            self._numbers[key] += 1
            name = key if self._numbers[key] == 1 else f"{key} {self._numbers[key]}"
        self._given.add(name)
        return name


def explain_personal(counts: Mapping[str, int]) -> str:
    """`3 email, 1 phone`, in the order of MASKS."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in MASKS if counts.get(kind))


def _emails(text: str) -> Iterator[_Span]:
    for match in _EMAIL.finditer(text) if "@" in text else ():
        if text[match.end() : match.end() + 1] not in ("(", "[") or _DOMAIN_BEFORE_BRACKET.fullmatch(match[1]):
            yield match.span()


def _accounts(text: str) -> Iterator[_Span]:
    at = 0
    while match := _IBAN.search(text, at):
        end = match.start() + _account_length(match[0], text[match.end() : match.end() + 1])
        if end > match.start():
            yield match.start(), end
        # A match may reach into the next account.
        at = max(end, match.start() + 4)


def _account_length(written: str, following: str) -> int:
    """How many characters of `written` are a bank account; 0: none. `following` is the character behind them."""
    size = _IBAN_LENGTHS.get(written[:2].upper(), 0)
    places = [place for place, char in enumerate(written) if char not in " -"]
    if not 0 < size <= len(places):
        return 0
    end = places[size - 1] + 1
    account = written[:end].replace(" ", "").replace("-", "").upper()
    after = (written + following)[end : end + 1]
    if (after.isascii() and after.isalnum()) or sum(char.isdecimal() for char in account) < 8:
        return 0
    # ISO 13616: the first four characters go to the end, letters become 10 to 35, and the remainder must be 1.
    return end if int("".join(str(int(char, 36)) for char in account[4:] + account[:4])) % 97 == 1 else 0


def _identities(text: str) -> Iterator[_Span]:
    for match in _CHINESE_ID.finditer(text):
        if _is_chinese_id(match[0]):
            yield match.span()
    yield from (match.span() for match in _SSN.finditer(text))


def _is_chinese_id(number: str) -> bool:
    """GB 11643: region, date of birth, order, and a check digit by ISO 7064 mod 11-2."""
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (1 << (17 - place)) for place, digit in enumerate(number[:17]))
    return 1880 <= born.year < 2100 and number[17].upper() == "10X98765432"[total % 11]


def _cards(text: str) -> Iterator[_Span]:
    for match in _CARD.finditer(text):
        digits = [int(char) for char in match[0] if char.isdecimal()]
        # Luhn: every second digit from the right counts double, and its own digits are added up.
        doubled = [sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits))]
        issued = _ISSUERS.fullmatch("".join(map(str, digits))) and len(set(digits)) > 1
        # In groups it is no number to count with: `4111 1111 1111 1111 / 12/25` is a card and when it ends.
        is_sum = match[0].isdecimal() and _is_arithmetic(text, *match.span())
        if issued and sum(doubled) % 10 == 0 and not is_sum:
            yield match.span()


def _phones(text: str) -> Iterator[_Span]:
    if not _SEVEN_DIGITS.search(text):
        return
    for match in _CHINESE_PHONE.finditer(text):
        if not _is_arithmetic(text, *match.span()):
            yield match.span()
    try:
        from phonenumbers import Leniency, PhoneNumberMatcher
    except ImportError as error:
        raise ConfigError(
            f"personal data: telephone numbers need phonenumbers ({error}); pip install 'rlhf-ray[quality]'"
        ) from error
    for region in REGIONS:  # a number with its country's code is found whatever the region is
        for match in PhoneNumberMatcher(text, region, Leniency.STRICT_GROUPING):
            # Digits in one, without a country's code, may be any number.
            if not match.raw_string.isdecimal() and not _is_arithmetic(text, match.start, match.end):
                yield match.start, match.end


def _is_arithmetic(text: str, start: int, end: int) -> bool:
    """Whether a number is part of a sum, or an amount of money."""
    before, number = text[max(0, start - 48) : start], text[start:end]
    is_behind_operator = _OPERATOR_BEFORE.search(before[-8:]) and not _NO_OPERATOR_BEFORE.search(before)
    if is_behind_operator and not _is_list(number, _STROKE_BEFORE.search(before)):
        return True
    if not _OPERATOR_AFTER.match(text, end) or (text[end : end + 1] == ">" and _IN_ANGLES.search(before)):
        return False
    return not (_NAME_AFTER.match(text, end) or _is_list(number, _STROKE_AFTER.match(text, end)))


def _is_list(number: str, other: re.Match[str] | None) -> bool:
    """Whether the number beside a stroke is another of its kind, not what it is divided by."""
    if other is None:
        return False
    return not (number.isdecimal() and other[1].isdecimal()) or len(number) == len(other[1])


# What is named first keeps its characters: the digits of an identity number may be a card's too.
_FINDERS: tuple[tuple[str, Callable[[str], Iterator[_Span]]], ...] = (
    (EMAIL, _emails),
    (ACCOUNT, _accounts),
    (IDENTITY, _identities),
    (CARD, _cards),
    (PHONE, _phones),
)
