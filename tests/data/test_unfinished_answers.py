"""Prompts that end with an unfinished answer, under each chat template that TRL ships: one meaning for all stages."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from rlhf_ray.data.chat import Chat
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.rendering import Renderer
from tests.data.make_golden_turns import READ_PARTS_ONLY, TURNS, stops_of, templates, tokenizer_for

if find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)
TEMPLATES = {name: text for name, text in templates().items() if not name.startswith(READ_PARTS_ONLY)}
WHOLE = "<think>\nThe chart says so.\n</think>\n\nTwenty at the buoy."


def asked(begun):
    return Chat((*TURNS[:-1], {"role": "assistant", "content": begun}))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("begun", "rest"), [
    ("Twenty at", " the buoy."), (WHOLE[:21], WHOLE[21:]), (WHOLE[:-10], WHOLE[-10:]), ("<think>The", "re</think>20")])
def test_only_the_rest_is_learned_behind_the_prompt_of_the_generator(name, begun, rest):
    tokenizer = tokenizer_for(TEMPLATES[name])
    encoder = Encoder(tokenizer)
    text, prompt = encoder.prompt(asked(begun))
    example = encoder.answer(asked(begun), rest)
    assert text.endswith(begun), "the model goes on right behind what is there"
    assert example.token_ids[: len(prompt)] == prompt and not any(example.learned[: len(prompt)])
    behind = tokenizer.decode(example.token_ids[len(prompt) :])
    end = ("<|END_RESPONSE|>" if name.startswith("cohere2") else "") + stops_of(name)[0]
    assert behind.rstrip() == rest + end and all(example.learned[len(prompt) :])
    assert encoder.completion(asked(begun), rest) == tuple(tokenizer(rest + end)["input_ids"])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_a_thought_that_is_begun_is_the_models_only_one(name):
    """Templates take it for the answer, and write an empty thought before it."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    text, _ = Encoder(tokenizer).prompt(asked("<think>\nThe chart"))
    question, _ = Renderer(tokenizer, {})(Chat(tuple(TURNS[:-1])), ask=True)
    assert text.removeprefix(question.removesuffix("<think>\n").removesuffix("<think>")) == "<think>\nThe chart"
