"""A text that somebody has put through the chat template is taken as it is, under each template that TRL ships."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.rendered import around_messages
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import char_tokenizer
from tests.data.make_golden_turns import conversations, stops_of, templates, tokenizer_for

if find_spec("trl") is None:
    pytest.skip("TRL is not installed", allow_module_level=True)
TEMPLATES = templates()
# No token of the tokenizer's own in it but BOS and EOS.
VICUNA = (
    "{{ bos_token + 'A chat. ' }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompts_of(name, tokenizer):
    """Each prompt that the golden conversations have, as whoever rendered them may have kept it."""
    for messages, tools in conversations(name).values():
        for end in (place for place, message in enumerate(messages, start=1) if message["role"] in ("user", "tool")):
            try:
                text = tokenizer.apply_chat_template(
                    messages[:end], tools=tools, tokenize=False, add_generation_prompt=True)
            except Exception:  # whatever a template raises
                continue
            yield from {text, text.removeprefix("<bos>"), text.removeprefix("<bos>").strip()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_prompt_is_not_rendered_again(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    encoder, texts = Encoder(tokenizer, style="chat"), list(prompts_of(name, tokenizer))
    assert texts
    for text in texts:
        assert encoder.prompt(text)[0] == text
        example = encoder.answer(text, "Yes.")
        learned = [token for token, known in zip(example.token_ids, example.learned, strict=True) if known]
        assert tokenizer.decode(learned) == "Yes." + stops_of(name)[0], "it ends as a turn does"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_rendered_also_where_it_speaks_of_roles_and_thoughts(name):
    question = "What do user, assistant: and <think>...</think> mean? USER:"
    encoder = Encoder(tokenizer_for(TEMPLATES[name]), style="chat")
    try:
        assert encoder.prompt(question)[0] != question
    except DataError as error:  # templates for images
        assert "drops the text of the user's message" in str(error)


def test_words_alone_make_a_rendered_text_only_together():
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyzACEINRSTU:.? ")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = VICUNA
    around = around_messages(tokenizer)
    assert (around.question, around.answer) == ("USER:", " ASSISTANT:")
    rendered = "A chat. USER: is it deep? ASSISTANT:"
    assert Encoder(tokenizer, style="chat").prompt(rendered)[0] == rendered
    for asked in ("what is a USER: in ASSISTANT: texts?", "what is the ASSISTANT:", "USER: is it deep?"):
        assert Encoder(tokenizer, style="chat").prompt(asked)[0] == f"<bos>A chat. USER: {asked} ASSISTANT:"


def test_line_breaks_that_are_tokens_of_their_own_tell_nothing():
    tokenizer = char_tokenizer("ab:QA")
    tokenizer.add_tokens(["\n", "\n\n"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    assert Encoder(tokenizer, style="chat").prompt("a\na:a")[0] == "u:a\na:a\na:"
    assert Encoder(tokenizer, style="chat").prompt("u:a\na:")[0] == "u:a\na:"


def test_without_a_template_nothing_is_rendered():
    assert not around_messages(char_tokenizer("ab")).stands_in("ab")
