"""A finished model writes: one prompt, a file, a chat; by the tokens, the template and the end of turn of its run."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from rlhf_ray.commands.generate.chat import chat
from rlhf_ray.commands.generate.writer import BATCH, LiveText, Writer, answered_rows, named_model
from rlhf_ray.config.generate import GenerateConfig
from rlhf_ray.data.chat import Chat
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.templates import CHAT_TEMPLATES
from rlhf_ray.data.types import detect, parse, texts_of
from rlhf_ray.errors import ConfigError, DataError, ModelError, Terminated
from rlhf_ray.models.folders import save_folder
from rlhf_ray.models.loading import load_policy
from rlhf_ray.models.scratch import build_scratch, build_scratch_classifier
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.roles.batch import build_batch

TEXT = (
    "the movie is (not) good, but long . / 他说：“GPT模型很好！” hello who are you é <|user|>"
    "\n<|assistant|>\n<|system|>"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_folder(folder, kind="char", model="qwen2", template=None, positions=400, specials=()):
    tokenizer = build_tokenizer(kind, [TEXT], vocab_size=300 if kind == "bpe" else None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = template
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "layers": 1, "heads": 2, "max_length": positions}
    save_folder(folder, build_scratch(model, **shape), tokenizer)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("generate") / "plain")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("generate") / "chatty", template=CHAT_TEMPLATES["zephyr"])


def writer(folder, **settings):
    return Writer(str(folder), GenerateConfig(**{"max_new_tokens": 12, "device": "cpu", **settings}))


class Scripted:
    """A generator that answers with the given texts, one after another, and remembers what it was asked."""

    def __init__(self, made: Writer, *texts: str, raising: type[BaseException] | None = None):
        self.tokenizer, self.texts, self.raising = made.tokenizer, list(texts), raising
        self.prompts, self.stop = [], ()
        made._generator = self

    def generate(self, requests, sampling, streamer=None):
        self.prompts += [self.tokenizer.decode(request.token_ids) for request in requests]
        self.stop = sampling.stop_token_ids
        ids = self.tokenizer(self.texts.pop(0), add_special_tokens=False).input_ids
        streamer.put(torch.tensor([requests[0].token_ids]))
        for token in ids:
            streamer.put(torch.tensor([token]))
        if self.raising is not None:
            raise self.raising
        streamer.end()
        return build_batch(requests, [ids], [[0.0] * len(ids)], truncated=[False], weight_version=0)


def talk(made: Writer, *lines: str) -> tuple[str, list[str]]:
    """(what was written, what was said beside it)"""
    given, written, said = iter(lines), [], []
    chat(made, lambda: next(given, None), written.append, said.append)
    return "".join(written), said


# ---- which model, asked how -----------------------------------------------------------------------------------


def test_a_run_directory_is_its_model_with_the_settings_of_the_run(tmp_path):
    run = tmp_path / "run"
    make_folder(run / "model", template=CHAT_TEMPLATES["zephyr"])
    settings = {"data": {"system_prompt": "who are you", "template": "auto"}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = named_model(str(run))
    assert (found.path, found.system) == (str(run / "model"), "who are you")
    made = writer(run)
    asked = made.tokenizer.decode(made.encode("hello"))
    assert asked == "<|system|>\nwho are you<eos>\n<|user|>\nhello<eos>\n<|assistant|>\n"
    asked = made.tokenizer.decode(writer(run, system="you are long").encode("hello"))
    assert asked.startswith("<|system|>\nyou are long<eos>")
    assert made.tokenizer.decode(writer(run, system="").encode("hello")).startswith("<|user|>")
    assert made.tokenizer.decode(writer(run, template="none").encode("hello")) == "hello"
    (run / "config.yaml").write_text("data: {template: none}")
    assert made.tokenizer.decode(writer(run).encode("hello")) == "hello"
    (run / "config.yaml").write_text("[broken")
    assert named_model(str(run)).path == str(run / "model")


def test_a_run_does_not_say_that_its_code_may_run_here(tmp_path):
    run = tmp_path / "run"
    make_folder(run / "model")
    (run / "config.yaml").write_text("model: {trust_remote_code: true}")
    config = json.loads((run / "model" / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.M"}}
    (run / "model" / "config.json").write_text(json.dumps(config))
    (run / "model" / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="read it, and if it may run here set .*--trust-remote-code"):
        writer(run)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError):  # it says nothing but that it ran
        writer(run, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_run_directory_without_a_model_says_what_there_is(tmp_path):
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(ModelError, match="a run directory that holds no model; a run writes model/ at its end"):
        named_model(str(tmp_path))
    for stage in ("sft", "rl"):  # a pipeline
        (tmp_path / stage / "model").mkdir(parents=True)
        (tmp_path / stage / "model" / "config.json").touch()
    with pytest.raises(ModelError, match=f"name one of {tmp_path}/rl, {tmp_path}/sft"):
        named_model(str(tmp_path))


def test_what_is_no_model_or_cannot_be_asked_so_is_refused(plain, chatty, tmp_path):
    tokenizer = build_tokenizer("char", [TEXT])
    judge = build_scratch_classifier("qwen2", labels=["score"], vocab_size=len(tokenizer), hidden_size=16, heads=2)
    save_folder(tmp_path / "judge", judge, tokenizer)
    with pytest.raises(ModelError, match="judge: a reward model or a classifier, which scores texts and writes none"):
        writer(tmp_path / "judge")
    with pytest.raises(ModelError, match="no such folder"):
        writer("nowhere/at/all")
    with pytest.raises(ConfigError, match="--template chat: the tokenizer of .* has no chat template; give --cha"):
        writer(plain, template="chat")
    for folder, template in ((plain, "auto"), (chatty, "none"), (chatty, "alpaca")):
        with pytest.raises(ConfigError, match="--system: a system message needs a chat template"):
            writer(folder, template=template, system="you are long")
    with pytest.raises(DataError, match="the prompt: holds half of a character"):
        writer(plain).encode("\ud800")


def test_a_prompt_goes_through_the_template_of_its_model_or_the_one_that_is_asked_for(plain, chatty):
    def asked(made):
        return made.tokenizer.decode(made.encode("hello"))

    assert asked(writer(plain)) == "hello"
    assert asked(writer(plain, chat_template="zephyr")) == "<|user|>\nhello<eos>\n<|assistant|>\n"
    assert asked(writer(chatty)) == "<|user|>\nhello<eos>\n<|assistant|>\n"
    assert asked(writer(chatty, template="none")) == "hello"
    assert writer(plain, template="alpaca").encode("hello") != writer(plain).encode("hello")


# ---- what is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
@pytest.mark.parametrize("model", ["qwen2", "gpt2", "lstm"])
def test_an_answer_is_what_generate_writes_and_is_streamed_whole(kind, model, tmp_path):
    folder = make_folder(tmp_path / "model", kind, model)
    made = writer(folder, temperature=0, max_new_tokens=30)
    ids = made.encode("the movie")
    pieces = []
    answer = made.answer(ids, live=made.live(ids, pieces.append))
    network = load_policy(folder)
    expected = network.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=30,
        eos_token_id=1, pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    ended = expected[-1] == 1
    both = made.tokenizer.decode([*ids, *expected], skip_special_tokens=True)
    assert both == made.tokenizer.decode(ids) + answer.text
    assert (answer.tokens, answer.finish_reason) == (len(expected), "stop" if ended else "length")
    assert "".join(pieces) == answer.text and len(pieces) > 1


def test_seeds(plain):
    ids = writer(plain).encode("hello")
    answers = [writer(plain, seed=seed, temperature=1.5).answer(ids).text for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]
    made = writer(plain, temperature=1.5)
    assert made.answer(ids, 0) != made.answer(ids, 1), "the same question twice in a chat"


def test_what_ends_a_turn_ends_an_answer(tmp_path):
    folder = make_folder(tmp_path / "model", template=CHATML, specials=["<|im_start|>", "<|im_end|>"])
    made = writer(folder)
    generator = Scripted(made, "hello<|im_end|>")
    ids = made.encode("who are you")
    answer = made.answer(ids, live=made.live(ids, lambda text: None))
    assert made.tokenizer.convert_tokens_to_ids("<|im_end|>") in generator.stop
    assert answer.text == "hello", "and is no part of it"


def test_half_a_character_and_a_blank_that_may_go_are_not_shown_before_they_are_sure():
    grown = iter(["a", "a \ufffd", "a \ufffd\ufffd", "a 好", "a 好 ", "a 好.", "b"])
    shown = []
    live = LiveText(lambda ids: next(grown), shown.append)
    live.put(torch.tensor([[5, 6]]))  # the prompt
    for token in range(7):
        live.put(torch.tensor([token]))
    assert shown == ["a", " 好", "."]


def test_a_prompt_near_the_last_position_gets_what_fits(tmp_path):
    made = writer(make_folder(tmp_path / "model", positions=20), max_new_tokens=10, temperature=0)
    ids = made.encode("hello who are you")  # 17 characters
    short, long = made.answers([made.encode("hello"), ids])
    assert long.tokens <= 3 and (long.tokens == 3) == (long.finish_reason == "length")
    assert short == made.answer(made.encode("hello")), "whatever stands beside it"
    with pytest.raises(DataError, match="the prompt has 20 tokens, and .* has 20 positions, so nothing can be written"):
        made.encode("hello who are you he")


# ---- files ----------------------------------------------------------------------------------------------------


def test_rows_of_a_file_are_answered_in_order_as_each_alone(plain, tmp_path):
    file = tmp_path / "prompts.txt"
    words = ["the movie", "hello", "他说", "who are you", "long"]
    file.write_text("".join(f"{words[i % 5]}\n\n" for i in range(BATCH + 3)))
    made = writer(plain, temperature=1.2, max_new_tokens=5)
    rows = list(answered_rows(made, made.read(str(file))))
    assert [row["prompt"] for row in rows] == [words[i % 5] for i in range(BATCH + 3)]
    assert rows[1]["where"] == f"{file}:3"
    for place in (0, 4, BATCH, BATCH + 2):
        answer = made.answer(made.encode(words[place % 5]), place)
        written = (rows[place]["completion"], rows[place]["finish_reason"], rows[place]["tokens"])
        assert written == (answer.text, answer.finish_reason, answer.tokens)


def test_any_type_of_row_is_a_prompt_and_what_is_written_is_a_dataset_again(chatty, tmp_path):
    messages = [{"role": "system", "content": "you are long"}, {"role": "user", "content": "hello"}]
    file, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"messages": [*messages, {"role": "assistant", "content": "who"}]}))
    made = writer(chatty)
    rows = list(answered_rows(made, made.read(str(file))))
    assert rows[0]["prompt"] == messages, "without the answer that is there"
    out.write_text(json.dumps(rows[0]))
    (row,) = read_rows(str(out))
    (record,) = parse(row, detect(row))
    assert record.prompt == Chat(tuple(messages)) and list(texts_of(record.completion)) == [rows[0]["completion"]]


def test_a_row_that_is_too_long_is_named(tmp_path):
    made = writer(make_folder(tmp_path / "model", positions=20))
    (tmp_path / "rows.txt").write_text("hello\nhello who are you hello\n")
    with pytest.raises(DataError, match=r"rows.txt:2: the prompt has 23 tokens, and .* 20 positions"):
        made.read(str(tmp_path / "rows.txt"))


# ---- a chat ---------------------------------------------------------------------------------------------------


def test_a_chat_keeps_what_was_said_until_it_is_reset(chatty):
    made = writer(chatty, system="you are good")
    generator = Scripted(made, "good<eos>", "long<eos>", "hello<eos>")
    written, said = talk(made, "hello", " ", "who are you", "/reset", "hello", "/exit", "never asked")
    assert written == "good\nlong\nhello\n" and said == ["the conversation is forgotten"]
    system, first = "<|system|>\nyou are good<eos>\n", "<|user|>\nhello<eos>\n<|assistant|>\n"
    assert generator.prompts == [
        system + first,
        f"{system}{first}good<eos>\n<|user|>\nwho are you<eos>\n<|assistant|>\n",
        system + first,
    ]


def test_a_model_without_a_template_goes_on_with_each_line(plain):
    made = writer(plain)
    generator = Scripted(made, " good", " long")
    written, said = talk(made, "the movie is", "hello")
    assert written == " good\n long\n" and generator.prompts == ["the movie is", "hello"] and not said


def test_a_word_with_a_stroke_is_a_command_and_a_path_is_a_question(chatty):
    made = writer(chatty)
    generator = Scripted(made, "good<eos>")
    _, said = talk(made, "/quit", "/the/movie")
    assert len(said) == 1 and said[0].startswith("there is no command /quit; /reset forgets")
    assert "/the/movie" in generator.prompts[0]


def test_an_answer_can_be_stopped_and_the_chat_goes_on(chatty):
    made = writer(chatty)
    Scripted(made, "good, but", raising=KeyboardInterrupt)
    given = iter(["hello", "who are you"])
    written, said = [], []

    def read():
        line = next(given, None)
        if line == "who are you":
            read.generator = Scripted(made, "long<eos>")
        return line

    chat(made, read, written.append, said.append)
    assert "".join(written) == "good, but\nlong\n" and said == ["(stopped)"]
    assert "<|assistant|>\ngood, but<eos>\n<|user|>\nwho are you" in read.generator.prompts[0]
    Scripted(made, "good", raising=Terminated)
    with pytest.raises(Terminated):
        talk(made, "hello")


def test_a_conversation_that_grows_too_long_is_said_and_can_be_reset(tmp_path):
    made = writer(make_folder(tmp_path / "model", template=CHAT_TEMPLATES["zephyr"], positions=60))
    generator = Scripted(made, "good<eos>", "long<eos>")
    written, said = talk(made, "hello", "who are you", "/reset", "who are you")
    assert said[0].startswith("the conversation has ") and said[0].endswith("/reset begins a new conversation")
    assert written == "good\nlong\n" and generator.prompts[1].startswith("<|user|>\nwho are you")


# ---- the command ----------------------------------------------------------------------------------------------


def test_the_command_answers_one_prompt_and_nothing_else_is_on_stdout(rlhf_ray, plain):
    made = writer(plain, temperature=0, max_new_tokens=9)
    answer = made.answer(made.encode("the movie"))
    options = ("--temperature", "0", "--max-new-tokens", "9", "--device", "cpu")
    status, out, err = rlhf_ray("generate", plain, "--prompt", "the movie", *options)
    assert (status, out) == (0, answer.text + "\n")
    assert ("(cut off at --max-new-tokens" in err) == (answer.finish_reason == "length")


def test_the_command_answers_a_file(rlhf_ray, plain, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "the movie"}\n{"prompt": "他说"}\n')
    options = ("--file", tmp_path / "p.jsonl", "--max-new-tokens", "3", "--device", "cpu")
    status, out, _ = rlhf_ray("generate", plain, *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["prompt"] for row in rows] == ["the movie", "他说"] and "他说" in out
    assert list(rows[0]) == ["where", "prompt", "completion", "finish_reason", "tokens"]
    status, printed, err = rlhf_ray("generate", plain, *options, "--out", tmp_path / "answers.jsonl")
    assert (status, printed) == (0, "") and f"2 answers are in {tmp_path}/answers.jsonl" in err
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == out


def test_the_command_chats_on_what_is_piped_into_it(rlhf_ray, chatty):
    options = ("--max-new-tokens", "3", "--device", "cpu", "--temperature", "0")
    status, out, err = rlhf_ray("generate", chatty, *options, stdin="hello\n/reset\nhello\n")
    answers = out.splitlines()
    assert status == 0 and "prompts go through the chat template; /reset forgets the conversation" in err
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :] and answers


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompt", "hi", "--file", "x.txt"], "--prompt and --file; give one of them"),
    (["--prompt", " "], "--prompt is empty; give a text, or leave it out for a chat"),
    (["--out", "x.jsonl"], "--out is for the answers to a --file"),
    (["--file", "x.txt", "--out", "no/such/folder/x.jsonl"], "lies in none, or is --file; name another file"),
    (["--file", "x.txt", "--out", "x.txt"], "is --file; name another file"),
    (["--file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--temperature", "-1"], "temperature: input should be greater than or equal to 0"),
    (["--top-p", "0"], "top_p: input should be greater than 0"),
    (["--max-new-tokens", "0"], "max_new_tokens: input should be greater than 0"),
    (["--template", "chatml"], "template: input should be 'auto', 'chat', 'alpaca' or 'none'"),
    (["--chat-template", "nowhere.jinja"], "nowhere.jinja: no such file"),
])  # fmt: skip
def test_every_refusal_is_one_paragraph(rlhf_ray, plain, arguments, message):
    status, out, err = rlhf_ray("generate", plain, *arguments)
    assert status == (3 if "no such file" in message else 2) and out == "" and err.startswith("rlhf-ray: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_run_says_how_to_talk_to_its_model_and_so_one_does(rlhf_ray, tiny_tree, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree))
    run = tmp_path / "a run"
    status, out, _ = rlhf_ray("rl", tmp_path / "tiny.yaml", "--run-dir", run)
    assert status == 0 and out.endswith(f"rlhf-ray generate '{run}'\n")
    status, out, _ = rlhf_ray("generate", run, "--prompt", "3+4=", "--device", "cpu")
    assert status == 0 and out.endswith("\n")
