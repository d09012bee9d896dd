from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from rlhf_ray.data.prompts import load_texts
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.models.tokenizers import (
    bpe_tokenizer,
    build_tokenizer,
    char_tokenizer,
    ensure_pad_token,
    word_tokenizer,
)

TEXTS = ["the movie doesn't work , it is (not) great ... really !", "the movie is a low-key film -- done"]


def test_char_ids_by_hand():
    tokenizer = char_tokenizer("0123456789+=")
    # <pad> <eos> <unk>, then the sorted alphabet: + 0 1 ... 9 =
    assert tokenizer("37+85=").input_ids == [7, 11, 3, 12, 9, 14]
    assert len(tokenizer) == 15
    assert tokenizer("3x").input_ids == [7, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@settings(deadline=None)
@given(st.text(alphabet="ab \n\tü.,'", max_size=40))
def test_char_comes_back_as_it_went_in(text):
    tokenizer = char_tokenizer(["ab \n\t", "ü.,'"])
    assert tokenizer.decode(tokenizer(text).input_ids) == text


BPE = bpe_tokenizer(TEXTS, vocab_size=300)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_bpe_comes_back_as_it_went_in(text):
    if "<pad>" not in text and "<eos>" not in text:
        assert BPE.decode(BPE(text).input_ids) == text


def test_word_tokens_and_spacing():
    tokenizer = word_tokenizer(TEXTS)
    ids = tokenizer("the movie doesn't work , (not) great ... low-key -- ok !").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *["the", "movie", "doesn't", "work", ",", "(", "not", ")"],
        *["great", "...", "low-key", "--", "<unk>", "!"],
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the movie doesn't work, (not) great... low-key --!"


def test_word_tokens_of_chinese_are_characters():
    # The twin of the test above: a character for each word, full-width marks, and no blanks.
    tokenizer = word_tokenizer(["这片不行，它是（非）妙……真！", "这片是一低——完"])
    ids = tokenizer("这片不行，（非）妙……低——好！").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *["这", "片", "不", "行", "，", "（", "非", "）"],
        *["妙", "……", "低", "——", "<unk>", "！"],
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "这片不行，（非）妙……低——！"


MIXED = [
    "今天天气很好，我们去公园。", "他说：“GPT模型（新）很好！”\n第2章", "我 喜欢 GPT-4　很 好", " 好\n\n好 ",
    "สวัสดี ครับ ที่นี่ดี", "ラーメン、食べたい？か\u3099", "می\u200cخواهم سلام", "हिन्दी में", "한국어 문장 漢字",
    "the word 好 is good",
]  # fmt: skip


def test_word_tokens_of_scripts_without_blanks_come_back_as_they_went_in(tmp_path):
    word_tokenizer(MIXED).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.batch_decode(tokenizer(MIXED).input_ids) == MIXED
    ids = tokenizer("我 喜欢GPT-4").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["我", " ", "喜", "欢", "GPT-4"]


@pytest.mark.parametrize(
    "text",
    [
        "他说：“走！”……——《完》", "价格是3.5元，12:30开门，共1,000个",
        "太好了❤️！好👍🏽很👨\u200d👩\u200d👧好", "到🇨🇳了👍👍👍好",
        "مرحبا، كيف حالك؟ نعم؛ لا", "यह अच्छा है। हाँ", "¿cómo estás? «bien»", "it is 3.5 or 1,000 at 12:30",
    ],
)  # fmt: skip
def test_signs_of_other_languages_numbers_and_emoji_come_back(text):
    tokenizer = word_tokenizer([text])
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_emoji_is_one_token():
    tokenizer = word_tokenizer(["👍🏽 ❤️ 👨\u200d👩\u200d👧 🇨🇳 1️⃣"])
    ids = tokenizer("❤️👨\u200d👩\u200d👧🇨🇳👍🏽 1️⃣").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["❤️", "👨\u200d👩\u200d👧", "🇨🇳", "👍🏽", "1️⃣"]


CHINESE = word_tokenizer(["好坏，。（“”…）ที่か1好GPT 好\n\t　好"])


PIECES = [*"好坏か \n\t　", "好，", "。好", "（坏", "ที่", "好“好”好", "好…好", "好GPT坏", "好1 好"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_chinese_comes_back(text):
    text = f"好{text}好"
    assert CHINESE.decode(CHINESE(text).input_ids) == text


@settings(deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=0x0DFF, exclude_categories=["Cs", "No"], exclude_characters="˪˫")))
def test_word_tokens_of_scripts_with_blanks_do_not_change(text):
    """The pattern is that of the time before there were others: English vocabularies and their ids stay."""
    before = pre_tokenizers.Split(Regex(r"\w+(?:['’-]\w+)*|([^\w\s])\1*"), "removed", invert=True)
    now = CHINESE.backend_tokenizer.pre_tokenizer
    assert now.pre_tokenize_str(text) == before.pre_tokenize_str(text)


def test_a_token_that_begins_with_two_hashes_keeps_them():
    tokenizer = word_tokenizer(["## heading ###", "“a” b"])
    assert tokenizer.decode(tokenizer("heading ## heading").input_ids) == "heading ## heading"
    assert tokenizer.decode(tokenizer("b “a” b").input_ids) == "b “a” b"


def test_word_keeps_the_most_frequent_and_breaks_ties_by_spelling():
    tokenizer = word_tokenizer(["b a c c", "d c a b"], max_size=6)
    # c 3 times, a and b twice, d once; room for 6 - 3 = 3
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["<pad>", "<eos>", "<unk>", "c", "a", "b"]


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_round_trip_through_a_folder(kind, tmp_path):
    tokenizer = build_tokenizer(kind, TEXTS, vocab_size=None if kind == "char" else 290)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXTS).input_ids
    assert loaded(TEXTS).input_ids == ids
    assert loaded.batch_decode(ids) == tokenizer.batch_decode(ids)
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id", "padding_side", "vocab_size"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_encoding_adds_nothing_and_eos_is_one_token(kind):
    tokenizer = build_tokenizer(kind, TEXTS, vocab_size=None if kind == "char" else 290)
    ids = tokenizer("the movie").input_ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer("the movie" + tokenizer.eos_token).input_ids == [*ids, tokenizer.eos_token_id]


@pytest.mark.slow
def test_bpe_is_the_same_in_every_process(shared_data):
    script = (
        "import sys, hashlib; from rlhf_ray.models.tokenizers import bpe_tokenizer;"
        "from rlhf_ray.data.prompts import load_texts;"
        "t = bpe_tokenizer(load_texts(sys.argv[1]), vocab_size=1000);"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    file = str(shared_data / "movie_reviews.test.jsonl")
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, file],
            env={**__import__("os").environ, "PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_reviews_come_back_whole(shared_data):
    texts = load_texts(str(shared_data / "movie_reviews.test.jsonl"))
    for tokenizer in (char_tokenizer(texts), bpe_tokenizer(texts, vocab_size=600)):
        assert tokenizer.batch_decode(tokenizer(texts).input_ids) == texts


def test_clear_refusals():
    with pytest.raises(ConfigError, match="alphabet"):
        build_tokenizer("char", TEXTS, vocab_size=30)
    with pytest.raises(ConfigError, match="needs vocab_size"):
        build_tokenizer("bpe", TEXTS)
    with pytest.raises(ConfigError, match="at least 258"):
        bpe_tokenizer(TEXTS, vocab_size=257)
    with pytest.raises(ConfigError, match="at least 4"):
        word_tokenizer(TEXTS, max_size=3)
    with pytest.raises(ConfigError, match="char, word or bpe"):
        build_tokenizer("sentencepiece", TEXTS)
    with pytest.raises(DataError, match="empty"):
        char_tokenizer("")
    with pytest.raises(DataError, match="no words"):
        word_tokenizer(["  "])


def test_a_missing_pad_token_becomes_eos():
    tokenizer = char_tokenizer("ab")
    tokenizer.pad_token = None
    assert ensure_pad_token(tokenizer).pad_token_id == tokenizer.eos_token_id == 1
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="my/folder: .*neither a pad nor an EOS"):
        ensure_pad_token(tokenizer, "my/folder")
