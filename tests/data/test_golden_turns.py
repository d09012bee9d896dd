"""Under every chat template that TRL ships: what is learned, what stops, and what a reward model reads.

The right values stand in golden_turns.json, which `apply_chat_template` alone has made (make_golden_turns.py).
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.turn_end import end_of_turn, turn_end_ids
from rlhf_ray.errors import DataError
from rlhf_ray.roles.objectives import BradleyTerry
from tests.data.make_golden_turns import GOLDEN, conversations, templates, tokenizer_for

if find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)
RIGHT = json.loads(GOLDEN.read_text(encoding="utf-8"))
TEMPLATES = templates()


@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_of_every_turn_is_what_the_golden_file_says(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    for kind, (messages, tools) in conversations(name).items():
        right, chat = RIGHT[name][kind], Chat(tuple(messages), tuple(tools or ()))
        if isinstance(right, str):
            with pytest.raises(DataError):
                Encoder(tokenizer).conversation(chat)
            continue
        learned = [
            token
            for example in Encoder(tokenizer).conversation(chat)
            for token, is_learned in zip(example.token_ids, example.learned, strict=True)
            if is_learned
        ]
        assert tokenizer.decode(learned) == "".join(right), kind
        assert learned == tokenizer("".join(right), add_special_tokens=False)["input_ids"], kind


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_ends_a_turn_is_what_the_models_of_the_family_stop_at(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    end, (answer, call) = end_of_turn(tokenizer), RIGHT[name]["stops"]
    assert end.answer == answer and end.call in ("", call)
    stops = [tokenizer.eos_token, answer, end.call or answer]
    assert turn_end_ids(tokenizer) == tuple(dict.fromkeys(tokenizer.convert_tokens_to_ids(stops)))


# Their answers have special tokens inside (channels), which no text of a completion keeps.
WITH_CHANNELS = ("cohere2", "gptoss", "muse")
# They write no plain text, and are refused.
FOR_IMAGES = ("idefics3", "llava_next", "smolvlm")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith(WITH_CHANNELS + FOR_IMAGES)])
def test_a_reward_model_learns_from_the_tokens_that_it_reads_in_reinforcement_learning(name):
    """There it gets the prompt's text and the completion, decoded without special tokens (`roles/reward.py`)."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    encoder, asked = Encoder(tokenizer), Chat(({"role": "user", "content": "One?"},))
    answer = ({"role": "assistant", "content": "The first."},)
    learned = BradleyTerry(0, turn_end_ids(tokenizer))._judged(encoder.answer(asked, answer)).token_ids
    read = encoder.prompt(asked)[0] + tokenizer.decode(encoder.completion(asked, answer), skip_special_tokens=True)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    assert tuple(tokenizer(read.removeprefix(tokenizer.bos_token) if begins else read)["input_ids"]) == learned
