"""Tokenizers made on the spot, for machines without downloads.

All three are ordinary `PreTrainedTokenizerFast` objects. `models/folders.py` writes them so that
`AutoTokenizer.from_pretrained` reads them back, whatever model lies in the folder. Ids 0, 1 and 2 are `<pad>`,
`<eos>` and `<unk>` (bpe has no `<unk>`). Encoding never adds a special token; whoever builds training rows
appends EOS on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_ray.data.words import EMOJI, WIDE, WORD
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.models.library_logs import wanted

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
TokenizerKind = Literal["char", "word", "bpe"]

# Words and characters are those of data/words.py. A run of one punctuation mark is one token ("...", "--"), because
# different marks side by side ("?)") mean different things. A blank beside a script without blanks is a token, for
# there nothing else says that it was written.
_TOKEN = rf"{WORD}|{EMOJI}|\s(?=\s*{WIDE})|(?<={WIDE})\s|(?<={WIDE}\s)\s|([^\w\s])\1*"
# Decoding writes a blank before every token, and takes away those that nobody writes: Chinese doubles its dash and its
# ellipsis, and a point or comma between digits is in a number (3.5) more often than between two.
_CLOSING = r" (?=[.,!?;:%)\]}’”،؛؟۔।॥»]|\.\.\.|——|……)"
_AFTER_OPENING = r"(?<=[(\[{$“«¿¡]|——|……) "
_IN_A_NUMBER = r"(?<=\d[.,:]) (?=\d)"
# Two characters that no text may hold stand for a blank that is a token, and for nothing at all: WordPiece's decoder
# glues what begins with its prefix, usually "##", to the word before.
_BLANK_TOKEN, _NO_PREFIX = "\ufdd0", "\ufdd1"
_BESIDE_WIDE = rf"[{WIDE}{_BLANK_TOKEN}[\s&&[^ ]]]"


def build_tokenizer(
    kind: TokenizerKind,
    texts: Iterable[str],
    *,
    vocab_size: int | None = None,
    max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """Learn a tokenizer from `texts`; the same texts always give the same tokenizer.

    `vocab_size` counts the special tokens. It is required for `bpe`, a ceiling for `word` (None: every word)
    and refused for `char`, whose vocabulary is the set of characters seen.
    """
    if kind == "char":
        if vocab_size is not None:
            raise ConfigError(
                f"tokenizer: kind=char with vocab_size={vocab_size}; the vocabulary of a character tokenizer is "
                "its alphabet; remove vocab_size, or choose kind=bpe"
            )
        return char_tokenizer(texts, max_length=max_length)
    if kind == "word":
        return word_tokenizer(texts, max_size=vocab_size, max_length=max_length)
    if kind == "bpe":
        if vocab_size is None:
            raise ConfigError("tokenizer: kind=bpe needs vocab_size; 2000 suits a megabyte of text")
        return bpe_tokenizer(texts, vocab_size=vocab_size, max_length=max_length)
    raise ConfigError(f"tokenizer: unknown kind {kind!r}; choose char, word or bpe")


def char_tokenizer(alphabet: str | Iterable[str], *, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """One token a character, for every character in `alphabet` (a string, or texts to collect it from).

    `decode(encode(x)) == x` for every x over the alphabet; any other character becomes `<unk>`.
    """
    characters = sorted(set().union(*alphabet))
    if not characters:
        raise DataError("tokenizer: the text for the character tokenizer is empty; give it at least one character")
    vocab = _numbered([PAD, EOS, UNK, *characters])
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk=True, max_length=max_length)


def word_tokenizer(
    texts: Iterable[str], *, max_size: int | None = None, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark (in scripts without blanks: a character): the `max_size` most frequent
    ones, all others `<unk>`.

    Decoding joins with spaces and closes them up before `. , ! ?`, after `( [ {` and in numbers. It writes none beside
    a character of a script without blanks, where each blank of the text is a token: Chinese with its punctuation and
    numbers comes back as it went in. Latin signs inside it are spaced as in English (A + B).
    """
    splitter = pre_tokenizers.Split(Regex(_TOKEN), "removed", invert=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    if not counts:
        raise DataError("tokenizer: the text for the word tokenizer holds no words; check the file and its field")
    # Ties are broken by spelling: Counter order would depend on the order of the rows.
    words = sorted(counts, key=lambda word: (-counts[word], word))
    room = len(words) if max_size is None else max_size - 3
    if room < 1:
        raise ConfigError(f"tokenizer: kind=word with vocab_size={max_size} leaves no room for words; set at least 4")
    tokenizer = Tokenizer(models.WordLevel(_numbered([PAD, EOS, UNK, *words[:room]]), unk_token=UNK))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(" ", _BLANK_TOKEN),
            decoders.WordPiece(prefix=_NO_PREFIX, cleanup=False),  # puts a space before every token but the first
            decoders.Fuse(),
            decoders.Replace(Regex(_CLOSING), ""),
            decoders.Replace(Regex(_AFTER_OPENING), ""),
            decoders.Replace(Regex(_IN_A_NUMBER), ""),
            decoders.Replace(Regex(rf"(?<={_BESIDE_WIDE}) | (?={_BESIDE_WIDE})"), ""),
            decoders.Replace(_BLANK_TOKEN, " "),
        ]
    )
    return _wrap(tokenizer, unk=True, max_length=max_length)


def bpe_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE: lossless for any text, so there is no `<unk>`."""
    smallest = 2 + 256
    if vocab_size < smallest:
        raise ConfigError(
            f"tokenizer: kind=bpe with vocab_size={vocab_size}; 256 bytes and 2 special tokens need at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, unk=False, max_length=max_length)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Give a tokenizer without a pad token the EOS token as pad token (in place; no embedding is added).

    Safe because every mask here comes from lengths, never from comparing ids with `pad_token_id`.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{name}: the tokenizer has neither a pad nor an EOS token, so completions could not end; "
                "set eos_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return without_advice(tokenizer)


def without_advice(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, which will not say that a text is longer than `model_max_length`.

    Texts are encoded whole here, to be counted, cut or refused: "will result in indexing errors" is not so.
    """
    if not wanted():
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _wrap(tokenizer: Tokenizer, *, unk: bool, max_length: int) -> PreTrainedTokenizerFast:
    return without_advice(PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK if unk else None,
        padding_side="left",  # what Hugging Face generate expects of a decoder
        model_max_length=max_length,
        # The clean-up would turn "do not" into "don't": text must come back as it went in.
        clean_up_tokenization_spaces=False,
    ))  # fmt: skip
