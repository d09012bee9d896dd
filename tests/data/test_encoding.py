"""Which tokens a model reads and which it learns, on the tokens themselves."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.chat import Chat, Instruction
from rlhf_ray.data.datasets import load_pairs, load_supervised
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.templates import CHAT_TEMPLATES, alpaca_prompt
from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.models.tokenizers import bpe_tokenizer, char_tokenizer

EOS = 1
CHAT = (
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "\n\ncd"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
)
# Header, text, and an end of turn that is no special token and has no EOS: nothing but text holds the pieces apart.
BARE = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture
def merging():
    """A byte-level BPE in which "ab" + "cd" is one token, and so are two line breaks."""
    tokenizer = bpe_tokenizer(["abcd"] * 9 + ["x\n\n"] * 9, vocab_size=263)
    assert tokenizer.tokenize("abcd") == ["abcd"] and tokenizer.tokenize("\n\n") == ["ĊĊ"]
    return tokenizer


@pytest.fixture
def chars():
    tokenizer = char_tokenizer("abcd:\nustrein<|>#.,IBOWRpkhqvwyoglfmz ")
    tokenizer.chat_template = CHAT_TEMPLATES["zephyr"]
    return tokenizer


def ids(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def learned_text(tokenizer, example):
    return tokenizer.decode([t for t, learned in zip(example.token_ids, example.learned, strict=True) if learned])


def test_answer_and_eos_are_learned_and_nothing_else(chars):
    example = Encoder(chars).answer("ab", "cd")
    assert example.token_ids == (*ids(chars, "abcd"), EOS)
    assert example.learned == (False, False, True, True, True)


def test_no_token_reaches_over_the_boundary(merging):
    together = ids(merging, "abcd")
    example = Encoder(merging).answer("ab", "cd")
    assert example.token_ids == (*ids(merging, "ab"), *ids(merging, "cd"), EOS)
    assert example.token_ids[:-1] != together, "else this test proves nothing"
    assert example.token_ids[: len(ids(merging, "ab"))] == Encoder(merging).prompt("ab")[1]
    assert merging.decode(example.token_ids) == "abcd<eos>"


def test_an_answer_that_ends_in_eos_gets_no_second_one(chars):
    assert Encoder(chars).answer("ab", "cd<eos>").token_ids == (*ids(chars, "abcd"), EOS)
    inside = Encoder(chars).answer("ab", "c<eos>d").token_ids
    assert inside == (*ids(chars, "abc"), EOS, *ids(chars, "d"), EOS)


def test_bos_before_plain_text_but_not_before_a_template_nor_in_the_middle(chars):
    chars.add_special_tokens({"bos_token": "<bos>"})
    bos = chars.convert_tokens_to_ids("<bos>")
    special = [("<bos>", bos), ("<eos>", EOS)]
    chars.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    assert chars("ab")["input_ids"] == [bos, *ids(chars, "ab"), EOS]
    example = Encoder(chars).answer("ab", "cd")
    assert example.token_ids == (bos, *ids(chars, "abcd"), EOS), "the tokenizer's own EOS would end the prompt"
    assert Encoder(chars).text("ab").token_ids == (bos, *ids(chars, "ab"), EOS)
    chat = Encoder(chars).conversation(Chat(CHAT))[0].token_ids
    assert bos not in chat and chat[:3] == ids(chars, "<|u")


def test_text_is_learned_whole(chars):
    assert Encoder(chars).text("ab").learned == (True, True, True)


# ---- tokenizers that put a blank before every text (Llama 2, Mistral) --------------------------------------


@pytest.fixture
def sentencepiece():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], initial_alphabet=list("\n"), show_progress=False
    )
    tokenizer.train_from_iterator(["two and two is four"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_an_answer_begins_without_a_blank_that_nobody_wrote(sentencepiece):
    assert sentencepiece.tokenize("two") == ["▁two"], "this tokenizer marks beginnings"
    glued = Encoder(sentencepiece).answer("is", "four")
    assert "▁four" not in sentencepiece.convert_ids_to_tokens(glued.token_ids)
    assert sentencepiece.decode(glued.token_ids, skip_special_tokens=True) == "isfour"
    spaced = Encoder(sentencepiece).answer("is", " four")
    assert sentencepiece.convert_ids_to_tokens(spaced.token_ids) == ["▁is", "▁four", "</s>"]
    assert spaced.learned == (False, True, True)


# ---- conversations ----------------------------------------------------------------------------------------


def test_every_answer_of_a_conversation_is_learned_or_only_the_last(chars):
    (example,) = Encoder(chars).conversation(Chat(CHAT))
    assert learned_text(chars, example) == "\n\ncd<eos>cd<eos>"
    text = "<|user|>\nab<eos>\n<|assistant|>\n\n\ncd<eos>\n<|user|>\nab<eos>\n<|assistant|>\ncd<eos>"
    assert example.token_ids == ids(chars, text)
    (last,) = Encoder(chars, learn="last").conversation(Chat(CHAT))
    assert last.token_ids == example.token_ids and learned_text(chars, last) == "cd<eos>"


def test_what_follows_the_last_answer_is_cut_off(chars):
    (example,) = Encoder(chars).conversation(Chat(CHAT[:3]))
    assert example.token_ids == Encoder(chars).conversation(Chat(CHAT[:2]))[0].token_ids


@pytest.mark.parametrize("template", [CHAT_TEMPLATES["zephyr"], BARE], ids=["marked", "bare"])
def test_training_sees_the_very_prompt_tokens_of_the_generator_also_where_tokens_would_merge(
    merging, template, tmp_path
):
    merging.chat_template = template
    whole = merging.apply_chat_template(list(CHAT), tokenize=False)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"messages": CHAT[:3]}) + "\n" + json.dumps({"messages": CHAT[:1]}))
    answers.write_text(json.dumps({"messages": CHAT}))
    long, short = load_prompts(str(prompts), merging).token_ids
    examples, _ = load_supervised(DatasetConfig(path=str(answers)), merging, seed=0)
    first, example = examples[0], examples[-1]  # one sequence, or one an answer

    assert example.token_ids[: len(long)] == long and example.token_ids[: len(short)] == short
    assert not example.learned[len(long) - 1] and all(example.learned[len(long) :])
    assert not any(first.learned[: len(short)]) and first.learned[len(short)]
    assert whole.startswith(merging.decode(long)), "and they spell what the template wrote"
    assert long != ids(merging, merging.decode(long)), "tokenized whole, the line breaks at the boundary merge"


def test_a_template_without_eos_teaches_to_stop(merging):
    merging.chat_template = BARE
    """In every turn: in one sequence, an answer that another turn follows would have nothing that stops it."""
    first, second = Encoder(merging).conversation(Chat(CHAT))
    assert first.token_ids[-1] == second.token_ids[-1] == EOS and first.learned[-1] and second.learned[-1]
    assert [learned_text(merging, e) for e in (first, second)] == ["\n\ncd\n<eos>", "cd\n<eos>"]


def test_what_a_template_writes_after_eos_is_not_learned(chars):
    chars.chat_template = CHAT_TEMPLATES["zephyr"].replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    (example,) = Encoder(chars).conversation(Chat(CHAT))
    assert learned_text(chars, example) == "\n\ncd<eos>cd<eos>"


def test_marks_that_begin_inside_the_generation_prompt_are_followed(chars):
    chars.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '\n' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ '\n' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    (example,) = Encoder(chars).conversation(Chat(CHAT[2:]))
    assert learned_text(chars, example) == "\ncd<eos>"
    prompt = Encoder(chars).prompt(Chat(CHAT[2:3]))[1]
    assert example.token_ids[: len(prompt)] == prompt and example.learned[len(prompt) - 1]


def test_a_template_that_rewrites_earlier_turns_makes_one_sequence_an_answer(chars):
    """As reasoning models do: the last answer keeps a part that earlier ones lose."""
    chars.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '##' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    first, second = Encoder(chars).conversation(Chat(CHAT))
    assert chars.decode(first.token_ids) == "<|user|>ab<eos><|assistant|>##\n\ncd<eos>"
    assert chars.decode(second.token_ids) == (
        "<|user|>ab<eos><|assistant|>\n\ncd<eos><|user|>ab<eos><|assistant|>##cd<eos>"
    )
    assert [learned_text(chars, e) for e in (first, second)] == ["##\n\ncd<eos>", "##cd<eos>"]
    prompt = Encoder(chars).prompt(Chat(CHAT[:3]))[1]
    assert second.token_ids[: len(prompt)] == prompt


def test_an_answer_after_another_prompt_than_the_generators_is_refused(chars):
    chars.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if think is not defined %}##{% endif %}{% endif %}"
    )
    with pytest.raises(DataError, match="not the beginning of its text with the answer.*chat_template_args"):
        Encoder(chars).conversation(Chat(CHAT[2:]))
    (example,) = Encoder(chars, chat_template_args={"think": False}).conversation(Chat(CHAT[2:]))
    assert learned_text(chars, example) == "cd<eos>"


def test_a_template_that_drops_the_answer_is_refused(chars):
    chars.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content[0].text }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(DataError, match="this chat template drops the text of the user's message .'ab'"):
        Encoder(chars).conversation(Chat(CHAT[2:]))


def test_a_system_prompt_comes_first_unless_there_is_one(chars):
    encoder = Encoder(chars, system_prompt="cd")
    assert encoder.prompt(Chat(CHAT[:1]))[0] == "<|system|>\ncd<eos>\n<|user|>\nab<eos>\n<|assistant|>\n"
    own = ({"role": "system", "content": "ab"}, *CHAT[:1])
    assert encoder.prompt(Chat(own))[0].startswith("<|system|>\nab<eos>\n<|user|>")


# ---- styles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "says"), [
    ("{% for m in messages %}\n{{ m.content }", r"the chat template is no Jinja .line 2: .*; mend it, or set"),
    ("{{ raise_exception('no system') }}", "the chat template refuses the conversation .no system.; mend the row, or"),
])  # fmt: skip
def test_a_template_that_cannot_be_used(chars, template, says):
    chars.chat_template = template
    with pytest.raises(DataError, match=says):
        Encoder(chars).prompt(Chat(CHAT[:1]))


def test_plain_prompts_and_answers_in_the_chat_template(chars):
    example = Encoder(chars, style="chat").answer("ab", " cd ")
    assert chars.decode(example.token_ids) == "<|user|>\nab<eos>\n<|assistant|>\n cd <eos>"
    assert learned_text(chars, example) == " cd <eos>", "an answer keeps its blanks"


def test_a_dialogue_in_the_chat_template(chars):
    example = Encoder(chars, style="chat").answer("\n\nHuman: ab\n\nAssistant: cd\n\nHuman: ab\n\nAssistant:", " cd")
    turn = "<|user|>\nab<eos>\n<|assistant|>\ncd<eos>"
    assert chars.decode(example.token_ids) == f"{turn}\n{turn}"
    assert learned_text(chars, example) == "cd<eos>", "the earlier answer belongs to the prompt"


def test_alpaca_with_and_without_input():
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert alpaca_prompt("Sing.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSing.\n\n### Response:\n"
    )


def test_instructions_in_each_style(merging):
    merging.chat_template = CHAT_TEMPLATES["zephyr"]
    task = Instruction("ab", "cd")
    texts = {style: Encoder(merging, style=style).prompt(task)[0] for style in ("auto", "alpaca", "none", "chat")}
    assert texts["auto"] == texts["alpaca"] == alpaca_prompt("ab", "cd")
    assert texts["none"] == "ab\n\ncd"
    assert texts["chat"] == "<|user|>\nab\n\ncd<eos>\n<|assistant|>\n"
    assert Encoder(merging, style="alpaca").prompt("ab")[0] == alpaca_prompt("ab")
    assert Encoder(merging).prompt("ab")[0] == "ab"
    example = Encoder(merging).answer(task, "cd")
    assert learned_text(merging, example) == "cd<eos>"


@pytest.mark.parametrize("style", ["alpaca", "none"])
def test_messages_have_no_place_in_a_plain_template(chars, style):
    with pytest.raises(DataError, match=f"data.template={style} has no place for them; set chat"):
        Encoder(chars, style=style).prompt(Chat(CHAT[:1]))


def test_a_tokenizer_without_eos_is_refused(chars):
    chars.eos_token = None
    with pytest.raises(ModelError, match="no EOS token, so no answer could end"):
        Encoder(chars)


# ---- pairs ------------------------------------------------------------------------------------------------


def test_both_answers_of_a_pair_follow_the_same_prompt_tokens(merging, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "ab", "chosen": "cd", "rejected": "ab", "margin": 2}))
    (pair,), _ = load_pairs(DatasetConfig(path=str(file)), merging, seed=0)
    prompt = ids(merging, "ab")
    assert pair.chosen.token_ids == (*prompt, *ids(merging, "cd"), EOS)
    assert pair.rejected.token_ids == (*prompt, *prompt, EOS)
    assert not any(pair.chosen.learned[: len(prompt)]) and all(pair.chosen.learned[len(prompt) :])
    assert pair.margin == 2.0
