"""The one segmentation: what is a word in each script."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from rlhf_ray.data.words import WORD, fold, is_latin, occurs, segment_spans, segments, spaced, words
from rlhf_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("don't low-key 3.5 x_y", ["don't", "low-key", "3", "5", "x_y"]),
        ("naïve Größe", ["naïve", "Größe"]),
        ("nai\u0308ve", ["nai\u0308ve"]),  # the same with a combining diaeresis
        ("我们都很好。", ["我", "们", "都", "很", "好"]),
        ("GPT模型很好", ["GPT", "模", "型", "很", "好"]),
        ("第3章、GPT-4", ["第", "3", "章", "GPT-4"]),
        ("時々〆切", ["時", "々", "〆", "切"]),
        ("ラーメンが好き", ["ラ", "ー", "メ", "ン", "が", "好", "き"]),
        ("か\u3099 ﾊﾞ", ["か\u3099", "ﾊﾞ"]),  # the voiced mark belongs to its kana, full and half width
        ("ที่นี่", ["ที่", "นี่"]),  # vowel and tone mark above their consonant
        ("ກາເຟ", ["ກ", "າ", "ເ", "ຟ"]),
        ("ស្រី", ["ស្រី"]),  # a consonant below another
        ("ကမ္ဘာ", ["က", "မ္ဘာ"]),
        ("བོད་ཡིག", ["བོ", "ད", "ཡི", "ག"]),
        ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),  # vowel signs are marks, not letters
        ("বাংলা தமிழ்", ["বাংলা", "தமிழ்"]),
        ("بِسْمِ اللَّهِ", ["بِسْمِ", "اللَّهِ"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # Persian joins with an invisible sign
        ("שלום עולם", ["שלום", "עולם"]),
        ("Привет, мир!", ["Привет", "мир"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ตลาด\u200bน้ำ", ["ต", "ล", "า", "ด", "น้", "ำ"]),
        ("?! — …", []),
        ("ok ❤️ 👍🏽 1️⃣", ["ok", "1️⃣"]),  # the invisible selector of an emoji is no word
    ],
)
def test_words_of_each_script(text, found):
    assert words(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("good, (very) good!", ["good,", "(very)", "good!"]),
        ("好，（很）好！", ["好，", "（很）", "好！"]),
        ("他说：“好。”", ["他", "说：", "“好。”"]),
        ("用GPT（模型）", ["用", "GPT", "（模", "型）"]),
        ("约3.5万 元", ["约", "3.5", "万", "元"]),
        ("，，好", ["，，", "好"]),
        ("ไป\u200bมา", ["ไ", "ป", "ม", "า"]),
    ],
)
def test_segments_keep_punctuation_where_it_touches(text, found):
    assert segments(text) == found
    assert [text[start:end] for start, end in segment_spans(text)] == found


BELOW_THAI = st.characters(max_codepoint=0x0DFF, exclude_categories=["Cs"], exclude_characters="˪˫")  # Bopomofo's


@given(st.text(alphabet=BELOW_THAI, max_size=30))
def test_segments_of_scripts_with_blanks_are_those_of_split(text):
    assert segments(text) == text.split() and spaced(text) == text


@given(st.text(alphabet="好坏a b,.（），。'-๑ที่が゛1\n", max_size=20))
def test_no_character_is_lost(text):
    assert "".join(segments(text)) == "".join(text.split())
    assert all(word in text for word in words(text))


@given(st.text(alphabet=st.characters(max_codepoint=0x2FFFF, exclude_categories=["Cs", "Cn"]), max_size=30))
def test_the_tokenizers_engine_reads_the_pattern_as_this_one_does(text):
    assert words(text) == [
        piece for piece, _ in pre_tokenizers.Split(Regex(WORD), "removed", invert=True).pre_tokenize_str(text)
    ]


def test_fold_is_what_makes_texts_equal():
    assert fold("ＧＰＴ Straße ΣΑΣ") == fold("gpt STRASSE σας")
    assert fold("ﬁlm ﾊﾞｽ") == "film バス"
    assert fold("İstanbul") == fold("istanbul") == "istanbul", "no dot is left behind"
    assert fold("sık") != fold("sik"), "two Turkish words"
    assert fold("cafe\u0301") == fold("CAFÉ") == "café"
    assert fold("❤️") == fold("❤") and fold("葛\U000e0100城") == "葛城"
    assert occurs("❤", "好❤️！") and occurs("❤️", "好❤！")


def test_spaced_for_libraries_that_split_at_blanks():
    assert spaced("GPT很好，真的。").split() == ["GPT", "很", "好", "，", "真", "的", "。"]
    assert spaced("ที่นี่ ok").split() == ["ที่", "นี่", "ok"]
    assert spaced("a  b") == "a  b"


def test_mostly_latin():
    assert is_latin("the film é") and is_latin("123 !") and is_latin("GPT模型")
    assert not is_latin("这部电影 GPT") and not is_latin("фильм")


def test_chinese_words_are_asked_for():
    text = "我们来到北京（清华大学），OpenAI很好"
    assert words(text, chinese="words") == ["我们", "来到", "北京", "清华大学", "OpenAI", "很", "好"]
    assert segments(text, chinese="words") == ["我们", "来到", "北京", "（清华大学），", "OpenAI", "很", "好"]
    assert words("low-key ที่นี่", chinese="words") == words("low-key ที่นี่"), "other scripts stay"
    assert words("北 京", chinese="words") == ["北", "京"], "a blank divides"
    with pytest.raises(ConfigError, match="chinese='word': choose characters, or words"):
        words("好", chinese="word")


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-ray\[chinese\]'"):
        words("好", chinese="words")
    assert words("好") == ["好"]
