"""Words of a text in any script: the one segmentation of everything that counts words.

Most scripts write blanks between words. These do not, and there each character (with its combining marks) stands
for itself: Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and their relatives. Two views of a text:

`segments("很好, very good!")` is 很 / 好, / very / good! - what `str.split` gives, for any script
`words("很好, very good!")` is 很 / 好 / very / good - without punctuation

Chinese words proper (很好 / very / good) need a dictionary: `chinese="words"`, an optional package.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal, get_args

import regex

from rlhf_ray.errors import ConfigError

Chinese = Literal["characters", "words"]

# The pieces of patterns below are read by two engines, `regex` here and Oniguruma in the word tokenizer.
_SCRIPTS = (
    "Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan",
    "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese",
)  # fmt: skip
_NAMED = "".join(rf"\p{{{name}}}" for name in _SCRIPTS)
# The long vowel sign and the repeat signs of kana belong to no script of their own.
SINGLE = rf"[[{_NAMED}ー〆〱-〵]&&[\w\p{{N}}]]"
# `\w` of both engines holds combining marks, without which Hindi and Arabic words fall apart (that of `re` does not);
# only one counts ½ in, and the other the invisible joiners of Persian and Indian words.
_JOINERS = "\u200c\u200d"
_LETTER = rf"(?:(?!{SINGLE}|[{_JOINERS}])[\w\p{{N}}])"
_MARKS = r"[\p{M}ﾞﾟ]*"
# Behind these signs a consonant is written below the one before (Burmese, Khmer, Tai Tham, Balinese, Javanese).
_STACKING = "\u1039\u17d2\u1a60\u1b44\ua9c0"
_STACKED = rf"(?:(?<=[{_STACKING}]){SINGLE}{_MARKS})*"
CHARACTER = rf"{SINGLE}{_MARKS}{_STACKED}"
# What makes ❤ a red heart and 1 a key is a mark without a letter: it may end a word (1️⃣), not begin one.
_EMOJI_MARKS = "\ufe00-\ufe0f\u20e3"
# A word may hold inner apostrophes and hyphens ("doesn't", "low-key"), and joiners.
WORD = rf"{CHARACTER}|(?![{_EMOJI_MARKS}]){_LETTER}+(?:['’{_JOINERS}-]{_LETTER}+)*"
# What is printed without a blank on either side: such a character, and the punctuation that goes with it.
_SIGNS = r"\u3001-\u303f\u3099\u309a\u30fb\u30fc\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uff9e\uff9f"
WIDE = rf"[{_NAMED}{_SIGNS}]"
# One emoji of several characters: with a colour or a skin, joined to others, a flag.
_COLOURS, _TAGS, _FLAGS = "\U0001f3fb-\U0001f3ff", "\U000e0020-\U000e007f", "\U0001f1e6-\U0001f1ff"
EMOJI = rf"[{_FLAGS}]{{2}}|[^\w\s](?:[{_EMOJI_MARKS}{_COLOURS}{_TAGS}]|\u200d[^\w\s])+"

_OPENING = r"[\p{Ps}\p{Pi}]*"
# The zero width space U+200B divides words of Thai and Khmer where an author wants it; U+001C to U+001F are blanks for
# `str.split` alone.
_BLANK = r"\s\u200b\x1c-\x1f"
_CLOSING = rf"(?:(?!{SINGLE})[^{_BLANK}\w\p{{N}}\p{{Ps}}\p{{Pi}}])*"
_SEGMENT = rf"{_OPENING}{CHARACTER}{_CLOSING}|(?:(?!{_OPENING}{SINGLE})[^{_BLANK}])+"

_SELECTORS = dict.fromkeys([*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])


def segments(text: str, *, chinese: Chinese = "characters") -> list[str]:
    """What `str.split` gives where blanks divide words; elsewhere one character a segment.

    Punctuation stays with what it touches, as in "good, bad": 好，坏 is 好， and 坏.
    """
    return [text[start:end] for start, end in segment_spans(text, chinese=chinese)]


def segment_spans(text: str, *, chinese: Chinese = "characters") -> Iterator[tuple[int, int]]:
    """(start, end) of each of the `segments`."""
    spans = (match.span() for match in _compiled(_SEGMENT).finditer(text))
    return spans if _check(chinese) == "characters" else _joined(text, spans)


def words(text: str, *, chinese: Chinese = "characters") -> list[str]:
    """Words without punctuation, as they are written; compare them after `fold`."""
    spans = (match.span() for match in _compiled(WORD).finditer(text))
    if _check(chinese) == "words":
        spans = _joined(text, spans)
    return [text[start:end] for start, end in spans]


def fold(text: str) -> str:
    """For comparison: upper and lower case are one, full-width and ligature forms are the plain ones, and so are
    variants of an emoji or a character that are told apart by an invisible selector (❤ and ❤️).

    Unicode's NFKC around its case folding. Turkish İ becomes i; ı stays itself, because without knowing the language
    it cannot be told which i a capital I is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_SELECTORS)).casefold())
    return folded.replace("i\u0307", "i")


def spaced(text: str, *, chinese: Chinese = "characters") -> str:
    """`text` with blanks around each character of a script without blanks and around the punctuation that goes
    with it: for libraries that split at blanks. Other text comes back as it is.
    """
    spans = (match.span() for match in _compiled(rf"{CHARACTER}|{WIDE}").finditer(text))
    parts, end_before = [], 0
    for start, end in spans if _check(chinese) == "characters" else _joined(text, spans):
        parts += [text[end_before:start], f" {text[start:end]} "]
        end_before = end
    return "".join([*parts, text[end_before:]])


def occurs(phrase: str, text: str, *, chinese: Chinese = "characters") -> bool:
    """Whether `text` holds `phrase` as whole words, both folded.

    "art" does not occur in "start". In scripts without blanks any run of whole characters is found (京都 in 东京都);
    with `chinese="words"` it has to begin and end where a word does.
    """
    text = fold(text)
    places = _phrase(phrase).finditer(text)
    if _check(chinese) == "characters":
        return next(places, None) is not None
    boundaries = chinese_boundaries(text)
    return any(
        (match.start() in boundaries or not _is_han(text, match.start()))
        and (match.end() in boundaries or not _is_han(text, match.end() - 1))
        for match in places
    )


@functools.lru_cache(maxsize=1024)
def _phrase(phrase: str) -> Any:
    folded = fold(phrase)
    starts, ends = _compiled(SINGLE).match(folded), _compiled(rf"{CHARACTER}$").search(folded)
    before = rf"(?<![{_STACKING}])" if starts else rf"(?<!{_LETTER})"
    after = r"(?![\p{M}ﾞﾟ])" if ends else rf"(?!{_LETTER})"
    return _compiled(before + regex.escape(folded, special_only=True) + after)


def is_latin(text: str) -> bool:
    """Whether at least half of the letters are Latin; also of a text without letters."""
    letters = len(_compiled(r"\p{L}").findall(text))
    return 2 * len(_compiled(r"\p{Latin}").findall(text)) >= letters


def chinese_boundaries(text: str) -> frozenset[int]:
    """The offsets at which a Chinese word begins or ends, by rjieba (jieba's dictionary and its hidden Markov model).

    Raises:
        ConfigError: the package is not installed.
    """
    offset, found = 0, {0}
    for word in _jieba().cut(text):
        offset += len(word)
        found.add(offset)
    return frozenset(found)


def _joined(text: str, spans: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans of which neighbours inside one Chinese word are one."""
    boundaries = chinese_boundaries(text)
    open_span: tuple[int, int] | None = None
    for start, end in spans:
        # Only characters that touch can be parts of a word; the library also cuts Latin words, which are whole here.
        if open_span and open_span[1] == start and start not in boundaries and _is_han(text, start):
            open_span = (open_span[0], end)
            continue
        if open_span:
            yield open_span
        open_span = (start, end)
    if open_span:
        yield open_span


def _is_han(text: str, place: int) -> bool:
    return _compiled(r"\p{Han}").match(text, place) is not None


def _check(chinese: str) -> str:
    if chinese not in get_args(Chinese):
        raise ConfigError(f"chinese={chinese!r}: choose characters, or words (pip install 'rlhf-ray[chinese]')")
    return chinese


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    return regex.compile(f"(?V1){pattern}")  # version 1 knows the intersection of classes


def _jieba() -> Any:
    try:
        import rjieba
    except ImportError as error:
        raise ConfigError(f"Chinese words need rjieba ({error}); pip install 'rlhf-ray[chinese]'") from error
    return rjieba
