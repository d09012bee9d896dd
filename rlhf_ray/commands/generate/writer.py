"""`rlhf-ray generate`: a finished model answers one prompt, or a file of them, as it did for its trainer.

The tokenizer, the prompt's template, what ends an answer, and the sampler are those of a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from rlhf_ray.config.generate import GenerateConfig
from rlhf_ray.config.user_paths import is_folder, typed_path
from rlhf_ray.data.chat import Chat, Prompt
from rlhf_ray.data.completion_text import CompletionText
from rlhf_ray.data.encoding import Encoder
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.rows import placed
from rlhf_ray.data.templates import set_chat_template
from rlhf_ray.data.turn_end import with_turn_ends
from rlhf_ray.data.values import check_text
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.evaluation.answers import prompt_text
from rlhf_ray.models.devices import choose_hardware
from rlhf_ray.models.fits import Limits, room_behind
from rlhf_ray.models.loading import load_policy, load_shape, load_tokenizer, stop_token_ids
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.run.directory import MARKS
from rlhf_ray.sample import sample_seed

BATCH = 32  # prompts answered at a time
_BEHIND = 16  # tokens of a prompt that decide how a continuation of it begins

Tokens = tuple[int, ...]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """A completion without what ends it. `finish_reason`: `stop` where it ended, `length` where it was cut off."""

    text: str
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Named:
    """What the name of a model stands for: the folder or Hub name to load, and how its run put prompts to it."""

    path: str
    template: str = "auto"
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)


def named_model(name: str) -> Named:
    """A run directory is its `model/`, with the settings of its config.yaml; anything else is a folder or Hub name.

    Raises ModelError for a run directory without a model.
    """
    folder = typed_path(name)
    if not is_folder(folder) or (folder / "config.json").is_file() or not any((folder / m).exists() for m in MARKS):
        return Named(name)
    if not (folder / "model" / "config.json").is_file():
        inner = sorted(str(path.parents[1]) for path in folder.glob("*/model/config.json"))
        raise ModelError(
            f"{name}: a run directory that holds no model; "
            + (f"name one of {', '.join(inner)}" if inner else "a run writes model/ at its end: go on with it "
               "(--resume auto), or name a model folder")
        )  # fmt: skip
    data = _data_settings(folder)
    # Not model.trust_remote_code: whoever passes a run on would decide that its code runs here.
    return Named(
        str(folder / "model"), data.get("template") or "auto", data.get("system_prompt"),
        data.get("chat_template_args") or {},
    )  # fmt: skip


def _data_settings(folder: Path) -> dict[str, Any]:
    """The section `data` of a run's config; empty where it has none."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    data = tree.get("data") if isinstance(tree, dict) else None
    return data if isinstance(data, dict) else {}


class Writer:
    """A model with its tokenizer. The tokenizer is there at once; the weights are loaded for the first answer.

    Raises ModelError, ConfigError, DataError: a model, a template or a system message that cannot be used.
    """

    def __init__(self, name: str, config: GenerateConfig) -> None:
        model = named_model(name)
        self.config, self.path = config, model.path
        self._trust = config.trust_remote_code
        self.tokenizer = load_tokenizer(self.path, trust_remote_code=self._trust)
        set_chat_template(self.tokenizer, config.chat_template)
        self.style = _style(config, model, bool(self.tokenizer.chat_template))
        self.chats = self.style == "chat"
        system = model.system if config.system is None else config.system
        if config.system and not self.chats:
            raise ConfigError(
                f"--system: a system message needs a chat template, and {self.path} is asked without one "
                f"({self.form}); write it into the prompt, or give --chat-template"
            )
        self._rendering = {"system_prompt": system or None, "chat_template_args": model.template_args}
        self._encoder = Encoder(self.tokenizer, style=self.style, **self._rendering)
        named = stop_token_ids(self.path, self.tokenizer, trust_remote_code=self._trust)
        self._stop = with_turn_ends(named, self.tokenizer)
        self._text = CompletionText(self.tokenizer, self._stop)
        shape = load_shape(self.path, trust_remote_code=self._trust)
        if any("ForSequenceClassification" in name for name in shape.architectures or ()):
            # Where the output head is the embeddings, one could load it all the same.
            raise ModelError(
                f"{self.path}: a reward model or a classifier, which scores texts and writes none; name a policy"
            )
        self._limits = Limits.of(self.path, shape)
        self._hardware = choose_hardware(config.device)
        self._generator: HFGenerator | None = None

    @property
    def form(self) -> str:
        """How prompts are put to the model, for people."""
        if self.chats:
            return "prompts go through the chat template"
        if self.style == "alpaca":
            return "prompts go through the Alpaca template"
        return "prompts are texts to continue, without a template"

    @property
    def cut_off(self) -> str:
        """Why an answer that did not end was no longer, for people."""
        return "cut off at --max-new-tokens, or at the model's last position"

    @property
    def generator(self) -> HFGenerator:
        if self._generator is None:
            model = load_policy(
                self.path, dtype=self._hardware.dtype, device=self._hardware.device, trust_remote_code=self._trust
            )
            self._generator = HFGenerator(model, pad_token_id=self.tokenizer.pad_token_id, batch_size=BATCH)
        return self._generator

    def read(self, source: str) -> PromptSet:
        """The prompts of a data file of any type, or the lines of a text file. Raises DataError, with file and line."""
        prompts = load_prompts(source, self.tokenizer, template=self.style, **self._rendering)
        for example, ids in zip(prompts.examples, prompts.token_ids, strict=True):
            room_behind(self._limits, ids, self.config.max_new_tokens, f"{example.where}: the prompt")
        return prompts

    def encode(self, prompt: Prompt, what: str = "the prompt") -> Tokens:
        """Its token ids. Raises DataError: nothing in it, more than the model reads, or refused by the template."""
        if isinstance(prompt, str):
            with placed(what):
                check_text(prompt)
        ids = self._encoder.prompt(prompt)[1]
        room_behind(self._limits, ids, self.config.max_new_tokens, what)
        return ids

    def answer(self, ids: Tokens, position: int = 0, live: LiveText | None = None) -> Answer:
        """The answer to one prompt; `position` keys its random numbers, `live` hears of it while it is written."""
        return self._written([ids], position, live)[0]

    def answers(self, prompts: Sequence[Tokens], position: int = 0) -> list[Answer]:
        """One answer a prompt, in order. Each depends on its prompt and its position alone."""
        return self._written(prompts, position, None)

    def live(self, ids: Tokens, write: OnText) -> LiveText:
        return LiveText(lambda written: self._decoded(ids, written), write)

    def _written(self, prompts: Sequence[Tokens], position: int, live: LiveText | None) -> list[Answer]:
        answers: dict[int, Answer] = {}
        limits = [room_behind(self._limits, ids, self.config.max_new_tokens) for ids in prompts]
        for limit in sorted(set(limits)):
            rows = [row for row, own in enumerate(limits) if own == limit]
            requests = [
                Request(row, row, prompts[row], sample_seed(self.config.seed, position + row, 0)) for row in rows
            ]
            sampling = Sampling(limit, self.config.temperature, self.config.top_p, stop_token_ids=self._stop)
            batch = self.generator.generate(requests, sampling, streamer=live)
            for place, row in enumerate(rows):
                ids = batch.tokens[place][batch.response_mask[place]].tolist()
                reason = "length" if batch.truncated[place] else "stop"
                answers[row] = Answer(self._decoded(prompts[row], ids), reason, len(ids))
        return [answers[row] for row in range(len(prompts))]

    def _decoded(self, prompt: Tokens, ids: Sequence[int]) -> str:
        """Of an answer in a conversation its own text; of a continuation the text as it reads behind its prompt."""
        behind = None if self.chats else self._text.decode_behind(prompt[-_BEHIND:], ids)
        return self._text.decode([ids])[0] if behind is None else behind


def _style(config: GenerateConfig, model: Named, has_template: bool) -> Any:
    """How prompts are put: what the command says, what the run's config says, or what the tokenizer is made for."""
    wanted = config.template if config.template != "auto" else model.template
    if wanted == "auto":
        return "chat" if has_template else "auto"
    if wanted == "chat" and not has_template:
        raise ConfigError(
            f"--template chat: the tokenizer of {model.path} has no chat template; give --chat-template (a .jinja "
            "file, or zephyr), or --template none"
        )
    return wanted


class LiveText(BaseStreamer):
    """Writes an answer as it grows: only what later tokens cannot change, half a character or a last blank waits."""

    def __init__(self, decode: Callable[[Sequence[int]], str], write: OnText) -> None:
        self._decode, self._write = decode, write
        self._ids: list[int] = []
        self._asked = False
        self._shown = ""

    @property
    def text(self) -> str:
        """All that has been written so far."""
        return self._decode(self._ids)

    def put(self, value: Tensor) -> None:
        if not self._asked:  # the first is the prompt
            self._asked = True
            return
        self._ids += value.reshape(-1).tolist()
        text = self.text
        if not text.endswith("\ufffd"):
            self._show(text.rstrip())

    def end(self) -> None:
        self._show(self.text)

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and text != self._shown:
            self._write(text[len(self._shown) :])
            self._shown = text


def answered_rows(writer: Writer, prompts: PromptSet) -> Iterator[dict[str, Any]]:
    """One row a prompt, in their order: where it stands, the prompt, the completion and how it ended."""
    for start in range(0, len(prompts), BATCH):
        part = prompts.slice(start, start + BATCH)
        for example, answer in zip(part.examples, writer.answers(part.token_ids, start), strict=True):
            yield {
                "where": example.where,
                **_asked(example.asked),
                "completion": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": answer.tokens,
            }


def _asked(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a column of a dataset, so that what is written can be read again."""
    if not isinstance(prompt, Chat):
        return {"prompt": prompt_text(prompt)}
    tools = {"tools": [dict(tool) for tool in prompt.tools]} if prompt.tools else {}
    return {"prompt": [dict(message) for message in prompt.messages], **tools}


def write_rows(rows: Iterator[dict[str, Any]], write: OnText) -> int:
    """Each row as a line of JSON as soon as it is there; returns how many."""
    count = 0
    for row in rows:
        write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        count += 1
    return count
