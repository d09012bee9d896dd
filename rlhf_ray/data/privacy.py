"""Personal data in texts: mail addresses, telephone, card, identity and bank account numbers, found and masked.

A number counts only where it is one: cards by Luhn's check digit and an issuer's prefix, Chinese identity numbers by
ISO 7064 (mod 11-2) and their date of birth, US social security numbers by their form and what was ever issued, bank
accounts by ISO 13616 (mod 97) and their country's length, telephone numbers by Google's metadata (phonenumbers). So
years, sums and long decimals stay. Names, postal addresses and other countries' identity numbers are not looked for:
this finds what can be told from other text by itself, and is no proof that a text has nothing else.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.data.rows import Row
from rlhf_ray.errors import ConfigError

EMAIL, PHONE, CARD, IDENTITY, ACCOUNT = "email", "phone", "card", "identity number", "bank account"
MASKS = {EMAIL: "[EMAIL]", PHONE: "[PHONE]", CARD: "[CARD]", IDENTITY: "[ID]", ACCOUNT: "[IBAN]"}

# Written without a country code, a number is read as one of these regions.
REGIONS = ("US",)

_Span = tuple[int, int]
# Full-width forms, and the digits of Arabic, Persian, Hindi and Thai: one character for one, so that places stay.
_PLAIN = {0xFF01 + offset: 0x21 + offset for offset in range(94)}
_PLAIN |= {zero + digit: 0x30 + digit for zero in (0x660, 0x6F0, 0x966, 0xE50) for digit in range(10)}
# Lengths bound every repetition: no text makes the search take more than linear time.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9(\[])"  # `q@k.transpose(1, 2)` is code
)
_BEFORE, _AFTER = r"(?<![0-9A-Za-z_])(?<!\d[.,])", r"(?![0-9A-Za-z_])(?![.,]\d)"
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
_IBAN = re.compile(r"(?<![0-9A-Za-z])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")
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
# In China the area code of a landline stands before a hyphen; mobile numbers are mostly written in one.
_CHINESE_PHONE = re.compile(
    rf"{_BEFORE}(?:(?:\+|00)?86[ -]?)?(?:1[3-9]\d([ -]?)\d{{4}}\1\d{{4}}|0(?:10|2\d|[3-9]\d{{2}})-[2-8]\d{{6,7}})"
    + _AFTER
)
_SEVEN_DIGITS = re.compile(r"\d(?:[^\w,=*/]{0,3}\d){6}")
_OPERATOR_BEFORE = re.compile(r"(?:[\d)\]}]\s*[-=+*/^×÷<>≈−]|[$¥￥€£])\s*$")
_OPERATOR_AFTER = re.compile(r"\s*(?:[=+*/^×÷<>≈%]|[-−]\s*\d|元)")


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
    for kind, finder in _FINDERS:
        for start, end in finder(text):
            if all(end <= other.start or start >= other.end for other in found):
                found.append(Personal(kind, start, end))
    return sorted(found, key=lambda item: item.start)


def masked(text: str, found: Sequence[Personal] | None = None) -> str:
    """`text` with [EMAIL], [PHONE] and so on in place of what was found."""
    for item in reversed(find_personal(text) if found is None else found):
        text = f"{text[: item.start]}{MASKS[item.kind]}{text[item.end :]}"
    return text


def shape(text: str) -> str:
    """What a personal datum looks like, for people to judge: all but its first character is hidden."""
    return text[:1] + re.sub(r"[^\W_]", "*", text[1:])


class PersonalData:
    """What is done about it in the rows of a source: none, count, or mask; `counts` says what was found, by kind."""

    def __init__(self, mode: Literal["none", "count", "mask"]):
        self._mode = mode
        self.counts: Counter[str] = Counter()

    def seen(self, row: Row) -> Row:
        """The row as it is to be used: all its columns, for any of them may reach a prompt or a reward."""
        if self._mode == "none":
            return row
        fields = masked_value(row.fields, self.counts)
        return Row(fields, row.where) if self._mode == "mask" else row


def strings_of(value: Any) -> Iterator[str]:
    """All strings of a row, at every depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings_of(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings_of(inner)


def masked_value(value: Any, counts: Counter[str]) -> Any:
    """A row's value with all its strings masked; `counts` gets what was found, by kind."""
    if isinstance(value, str):
        found = find_personal(value)
        counts.update(item.kind for item in found)
        return masked(value, found)
    if isinstance(value, Mapping):
        return {key: masked_value(inner, counts) for key, inner in value.items()}
    return [masked_value(inner, counts) for inner in value] if isinstance(value, (list, tuple)) else value


def explain_personal(counts: Mapping[str, int]) -> str:
    """`3 email, 1 phone`, in the order of MASKS."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in MASKS if counts.get(kind))


def _emails(text: str) -> Iterator[_Span]:
    return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else iter(())


def _accounts(text: str) -> Iterator[_Span]:
    for match in _IBAN.finditer(text):
        size, places = _IBAN_LENGTHS.get(match[0][:2], 0), [i for i, char in enumerate(match[0]) if char != " "]
        if not 0 < size <= len(places):
            continue
        end = match.start() + places[size - 1] + 1
        account = match[0].replace(" ", "")[:size]
        if text[end : end + 1].isalnum():
            continue
        # ISO 13616: the first four characters go to the end, letters become 10 to 35, and the remainder must be 1.
        if int("".join(str(int(char, 36)) for char in account[4:] + account[:4])) % 97 == 1:
            yield match.start(), end


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
        if issued and sum(doubled) % 10 == 0 and not _is_arithmetic(text, *match.span()):
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
    return bool(_OPERATOR_BEFORE.search(text[max(0, start - 8) : start]) or _OPERATOR_AFTER.match(text, end))


# What is named first keeps its characters: the digits of an identity number may be a card's too.
_FINDERS: tuple[tuple[str, Callable[[str], Iterator[_Span]]], ...] = (
    (EMAIL, _emails),
    (ACCOUNT, _accounts),
    (IDENTITY, _identities),
    (CARD, _cards),
    (PHONE, _phones),
)
