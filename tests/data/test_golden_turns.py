"""Under every chat template that TRL ships: what is learned, what stops, and what a reward model reads.

The right values stand in golden_turns.json, which `apply_chat_template` alone has made (make_golden_turns.py).
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest
from jinja2 import TemplateError

from rlhf_ray.config.rewards import RewardModelConfig
from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.turn_end import end_of_turn, turn_end_ids
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.classifier import TextScores
from rlhf_ray.rewards.compose import RewardSet
from rlhf_ray.rewards.reading import Reader
from rlhf_ray.roles.batch import build_batch
from rlhf_ray.roles.protocols import Request
from rlhf_ray.roles.reward import Reward
from tests.data.make_golden_turns import GOLDEN, READ_PARTS_ONLY, conversations, templates, tokenizer_for

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


class Judge:
    """Keeps the tokens that a reward model with this tokenizer would read."""

    def __init__(self, tokenizer, policy):
        self.config = RewardModelConfig(path="judge")
        self.reader = Reader(tokenizer, scores_pairs=True, policy=policy)

    def score(self, answers):
        self.read = [self.reader.read(answered) for answered in answers]
        return TextScores([0.0] * len(answers), 0)


def read_in_rl(judge, policy, chat, answer, *, finished=True, end=()):
    """What `judge` reads of the answer, if the policy writes it; `end` in place of what the template ends it with."""
    encoder = Encoder(policy)
    completion = encoder.completion(chat, answer)
    completion = (*completion[:-1], *(end or completion[-1:] if finished else ()))
    request = Request(0, 0, encoder.prompt(chat)[1], 0, {"prompt": encoder.prompt(chat)[0]}, chat=encoder.chat_of(chat))
    batch = build_batch([request], [completion], [[0.0] * len(completion)], truncated=[not finished], weight_version=0)
    Reward(RewardSet([]), policy, model=judge).score(batch)
    return judge.read[0]


def conversation(name):
    """(prompt, answer, answer as text) of the last turn, in the form that the template reads."""
    messages, _ = conversations(name)["no system"]
    content = messages[-1]["content"]
    return Chat(tuple(messages[:-1])), (messages[-1],), content if isinstance(content, str) else content[0]["text"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reward_model_reads_in_reinforcement_learning_what_it_learned_from(name):
    tokenizer, policy = tokenizer_for(TEMPLATES[name]), tokenizer_for(TEMPLATES[name])
    (chat, answer, _), encoder = conversation(name), Encoder(tokenizer)
    learned = encoder.as_judged(chat, encoder.answer(chat, answer)).token_ids
    assert tokenizer.convert_ids_to_tokens(learned[-1]) == RIGHT[name]["stops"][0], "nothing behind what ends the turn"
    assert read_in_rl(Judge(tokenizer, policy), policy, chat, answer) == learned
    assert read_in_rl(Judge(tokenizer, policy), policy, chat, answer, finished=False) == learned[:-1]
    stopped = read_in_rl(Judge(tokenizer, policy), policy, chat, answer, end=(policy.eos_token_id,))
    assert stopped == learned, "a policy that stops at EOS gains or loses nothing by it"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith(READ_PARTS_ONLY)])
def test_a_reward_model_of_another_family_reads_its_own_template(name):
    """The policy writes in ours; as in training, the judge's template writes the conversation."""
    tokenizer, policy = tokenizer_for(TEMPLATES[name]), tokenizer_for(TEMPLATES["zephyr"])
    policy.chat_template += "{# another family #}"
    (chat, answer, text), encoder = conversation(name), Encoder(tokenizer)
    learned = encoder.as_judged(chat, encoder.answer(chat, answer)).token_ids
    assert read_in_rl(Judge(tokenizer, policy), policy, chat, text) == learned
    assert read_in_rl(Judge(tokenizer, policy), policy, chat, text, finished=False) == learned[:-1]
    assert policy.decode(learned).count("<|assistant|>\nTwenty") == (name == "zephyr" or name.startswith("phi3"))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith(READ_PARTS_ONLY)])
def test_an_assistant_that_speaks_twice_ends_its_first_message(name):
    """What was said first is finished: the text is the template's own, and nothing of it stands there twice."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    said = ({"role": "assistant", "content": text} for text in ("Nine fathoms.", "Ten at the buoy."))
    chat = Chat(({"role": "user", "content": "Is it deep?"}, *said))
    try:
        right = tokenizer.apply_chat_template(list(chat.messages), tokenize=False)
        last = Encoder(tokenizer).conversation(chat)[-1]
    except (DataError, TemplateError) as error:  # roles must alternate; or what was said first is written otherwise
        assert re.search("alternate|not the beginning", str(error))
        return
    text = tokenizer.decode(last.token_ids)
    assert _without_opened_thoughts(right).startswith(_without_opened_thoughts(text[: text.rfind("buoy.") + 5]))
    learned = tokenizer.decode([t for t, known in zip(last.token_ids, last.learned, strict=True) if known])
    assert learned.count("Ten at the buoy.") == 1 and learned.count("Nine fathoms.") <= 1
    assert learned.count(RIGHT[name]["stops"][0]) == 1 + ("Nine fathoms." in learned)


def _without_opened_thoughts(text):
    return re.sub(r"<think>\s*(?:</think>\s*)?", "", text)
