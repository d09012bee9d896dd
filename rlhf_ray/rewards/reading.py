"""What a judge (a reward model, a safety classifier) reads of an answer: the very tokens that it reads in training.

A judge may be of another family than the policy. It reads a conversation in its own chat template, up to its own end of
turn; a plain text stays one. A judge without a chat template reads the text that the policy's template has written.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.errors import DataError, RewardError


@dataclass(frozen=True)
class Answered:
    """An answer to judge: `prompt` as the policy read it, `answer` as it reads behind that, `said` as it reads alone.

    `chat`: the prompt as a conversation, before any template; None: a plain text. `ids`: the policy's tokens of both.
    """

    prompt: str
    answer: str
    chat: Chat | None = None
    said: str = ""
    ids: tuple[int, ...] = ()
    finished: bool = True  # it ended, and was not cut at a limit

    @property
    def whole(self) -> str:
        return self.prompt + self.answer


class Reader:
    """Makes tokens of answers for one judge.

    `scores_pairs`: the judge has one label, as `rlhf-ray rm` teaches it: a prompt and its answer are tokenized apart.
    Any other classifier reads both as one text. `policy`: the tokenizer of whoever wrote the answers; where the judge's
    is the same, it reads the policy's own tokens, with the special ones that no text keeps, up to its own end of turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scores_pairs: bool,
        policy: PreTrainedTokenizerBase | None = None,
        clock: datetime | None = None,
    ):
        # A tokenizer without EOS (BERT's) ends no turn, and has nothing but whole texts to offer.
        self._encoder = None if tokenizer.eos_token_id is None else Encoder(tokenizer, clock=clock)
        self._templated = self._encoder is not None and bool(tokenizer.chat_template)
        self._apart = self._encoder is not None and scores_pairs
        self._same = policy is not None and _are_same(tokenizer, policy)

    def read(self, answered: Answered | str) -> str | tuple[int, ...]:
        """A text for the judge's tokenizer, or the tokens. Raises RewardError where its chat template refuses them."""
        if isinstance(answered, str):
            return answered
        if answered.chat is not None and self._templated:
            if self._same and answered.ids:
                return self._encoder.with_own_end(answered.ids) if answered.finished else answered.ids
            try:
                judged = self._encoder.judged(answered.chat, answered.said, finished=answered.finished)
            except DataError as error:
                raise RewardError(f"its tokenizer cannot write the conversation: {error}") from error
            return judged.token_ids
        if self._apart and answered.prompt:
            return self._encoder.judged(answered.prompt, answered.answer, finished=answered.finished).token_ids
        return answered.whole


def _are_same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers write the same tokens for the same conversation."""
    return (
        one.chat_template == other.chat_template
        and one.eos_token_id == other.eos_token_id
        and one.get_vocab() == other.get_vocab()
    )
