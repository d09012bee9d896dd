"""Prompts that are written in both answers only: the shared beginning of two dialogues, and Anthropic HH's turns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from rlhf_ray.errors import DataError

ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def shared_text(chosen: str, rejected: str, *, where: str) -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of two whole texts that begin alike.

    In Anthropic HH's format (Bai et al., "Training a Helpful and Harmless Assistant with RLHF", 2022) the prompt ends
    with the last `\\n\\nAssistant:` that both share: answers that begin with the same words keep them. In any other
    text it ends where the two differ, at a blank before that word, as in TRL. Prompt + answer is the text as it was.
    Raises DataError where nothing is shared.
    """
    common = len(os.path.commonprefix([chosen, rejected]))
    cut = common - 1 if common and chosen[common - 1] == " " else common
    if ASSISTANT in chosen[:common]:
        cut = chosen.rindex(ASSISTANT, 0, common) + len(ASSISTANT)
    if not chosen[:cut].strip():
        raise DataError(
            f"{where}: 'chosen' and 'rejected' share no beginning, so there is no prompt; add a field 'prompt', or "
            "write both as whole dialogues"
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def shared_messages(
    chosen: tuple[Mapping[str, Any], ...], rejected: tuple[Mapping[str, Any], ...], *, where: str
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """(prompt, chosen answer, rejected answer) of two whole conversations; the prompt ends before an assistant's turn.

    Raises DataError where the first messages differ, or one conversation is the beginning of the other.
    """
    cut = 0
    while cut < min(len(chosen), len(rejected)) - 1 and chosen[cut] == rejected[cut]:
        cut += 1
    if cut == 0:
        raise DataError(f"{where}: 'chosen' and 'rejected' differ in their first message, so there is no prompt")
    if chosen[cut]["role"] != "assistant" or rejected[cut]["role"] != "assistant":
        raise DataError(
            f"{where}: 'chosen' and 'rejected' differ from message {cut + 1} on, which is not the assistant's in both; "
            "they must share everything up to an answer"
        )
    while cut > 1 and chosen[cut - 1]["role"] == "assistant":
        cut -= 1  # else the answer that both begin with would be taken for one that is to be gone on with
    return chosen[:cut], chosen[cut:], rejected[cut:]


def is_dialogue(text: str) -> bool:
    """Whether a text is written in Anthropic HH's turns."""
    return bool(_TURN.match(text))


def dialogue_messages(text: str) -> tuple[dict[str, str], ...]:
    """The turns of an Anthropic HH dialogue as messages; an answer that is still to come makes no message."""
    _, *parts = _TURN.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple({"role": _ROLES[who], "content": said.strip()} for who, said in turns if said.strip())
