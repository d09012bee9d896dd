"""How varied texts are: distinct-n and self-BLEU."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rlhf_ray.data.words import Chinese, segments, spaced


def distinct_n(texts: Sequence[str], n: int, *, chinese: Chinese = "characters") -> float:
    """Different n-grams of words over all n-grams, of all texts together (Li et al., 2016). 1 if there are none.

    Words are those between blanks, and characters where a script has no blanks (data/words.py).
    """
    return distinct_ngrams([segments(text, chinese=chinese) for text in texts], n)


def distinct_ngrams(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """`distinct_n` of texts that are cut already: into words, or into token ids."""
    grams = [tuple(items[i : i + n]) for items in sequences for i in range(len(items) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def self_bleu(texts: Sequence[str], limit: int = 200, *, chinese: Chinese = "characters") -> float | None:
    """Mean BLEU-4 of each text with all others as its references (Zhu et al., 2018): 0 all different, 1 all equal.

    sacrebleu's sentence BLEU with its 13a tokens, exponential smoothing and, for texts of fewer than four tokens,
    only the n-grams that there are. Characters of scripts without blanks are tokens of their own, for Chinese nearly
    the same ones as with its `zh` tokens (which also part signs that Latin has, like quotes, from each other). Its cost
    grows with the square of the number of texts: of more than `limit`, evenly spaced ones are taken. None for fewer
    than two texts, for there is nothing to compare.
    """
    from sacrebleu.metrics import BLEU  # it is not needed in training

    chosen = [spaced(text, chinese=chinese) for text in evenly_spaced(texts, limit)]
    if len(chosen) < 2:
        return None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [*chosen[:i], *chosen[i + 1 :]]).score for i, text in enumerate(chosen)]
    return min(1.0, sum(scores) / len(scores) / 100)  # 100 comes out as 100.00000000000004


def evenly_spaced(items: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of the items, from the first on, at even distances."""
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]
