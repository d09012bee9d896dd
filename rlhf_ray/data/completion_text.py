"""The text of a completion: what rewards, judges, reward models, samples and reports read.

Special tokens that control the generator (EOS, what ends a turn, BOS, padding, the unknown token) are no part of it:
`<|im_end|>` at the end would keep an answer from being equal to the right one. Every other special token is: a policy
that was taught `<answer>` as one writes it to be read, and whoever judges the completion sees what it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.turn_end import with_turn_ends

_CONTROL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class CompletionText:
    """Decodes completions. `stop`: ids that end an answer beside the tokenizer's EOS and its template's end of turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        named = {getattr(tokenizer, f"{name}_token_id") for name in _CONTROL}
        self._control = {token for token in (*with_turn_ends(stop, tokenizer), *named) if token is not None}
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        # What ends a turn may be an ordinary word of a small vocabulary: that one is text.
        self._special = added | set(tokenizer.all_special_ids)
        self._control &= self._special

    def decode(self, ids_B: Sequence[Sequence[int]]) -> list[str]:
        """One text a row."""
        return self._plain([[token for token in ids if token not in self._control] for ids in ids_B])

    def decode_behind(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str | None:
        """A completion's text as it reads behind its prompt; None where the two cannot be told apart.

        Word and SentencePiece tokenizers lose the blank before a completion that is decoded alone ("was" + "good" would
        read "wasgood"); decoded after its prompt it is there.
        """
        start = [token for token in prompt_ids if token not in self._special]
        behind = [token for token in ids if token not in self._control]
        before, whole = self._plain([start, start + behind])
        return whole[len(before) :] if whole.startswith(before) else None

    def _plain(self, ids_B: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids_B, skip_special_tokens=False)
