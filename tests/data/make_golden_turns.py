"""Writes golden_turns.json: what is learned of each assistant's turn under the chat templates that TRL ships.

    python tests/data/make_golden_turns.py

It knows `apply_chat_template` and a table of what the families' models stop at, and nothing of this package but the
tokenizer of single bytes: learned of a turn is what the template marks with `{% generation %}` behind the message
before it, or, without marks, what its text has more than the prompt with `add_generation_prompt`; up to what stops the
model (with marks also the line break that they hold behind it).
"""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_ray.data.templates import CHAT_TEMPLATES
from rlhf_ray.models.tokenizers import bpe_tokenizer

GOLDEN = Path(__file__).with_name("golden_turns.json")

# What stops the families' models behind an answer and behind a call (their generation_config.json); longest name first.
STOPS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma4_v2": ("<turn|>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "lfm2": ("<|im_end|>",),
    "llama3": ("<|eot_id|>",),
    "llava_next": ("</s>",),
    "muse_glimmer": ("<|eot|>",),
    "nemotron": ("<|im_end|>",),
    "phi3": ("<|end|>",),
    "qwen": ("<|im_end|>",),
    "smolvlm": ("<end_of_utterance>",),
    "zephyr": ("<eos>",),
}
SPECIAL = (
    *sorted({stop for stops in STOPS.values() for stop in stops} - {"<eos>"}),
    *("<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|begin_of_text|>"),
    *("<start_of_turn>", "<|turn>", "<|tool_call>", "<tool_call|>", "<tool_response|>", "<|channel>", "<channel|>"),
    *("<|system|>", "<|assistant|>", "[gMASK]", "<sop>", "<|start|>", "<|message|>", "<|channel|>", "<|eom|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>"),
    *("<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "[INST]", "[/INST]"),
)
READ_PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")

TOOLS = [{
    "type": "function",
    "function": {
        "name": "lookup_tide",
        "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string", "description": "Where"}},
                       "required": ["harbour"]},
    },
}]  # fmt: skip
_CALL = {"type": "function", "id": "call00001",
         "function": {"name": "lookup_tide", "arguments": {"harbour": "Bergen"}}}  # fmt: skip
SYSTEM = {"role": "system", "content": "Speak of harbours only."}
TURNS = [
    {"role": "user", "content": "Is it deep?"},
    {"role": "assistant", "content": "Nine fathoms."},
    {"role": "user", "content": "And outside?"},
    {"role": "assistant", "content": "Twenty at the buoy."},
]
CALLING = [
    {"role": "user", "content": "How high is it?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "lookup_tide", "tool_call_id": "call00001", "content": "12 dm"},
    {"role": "assistant", "content": "It is 1.2 metres."},
    {"role": "user", "content": "And outside?"},
    {"role": "assistant", "content": "Nobody knows."},
]


def templates() -> dict[str, str]:
    """TRL's, without importing it, and our own, by name."""
    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    return {**{file.stem: file.read_text() for file in sorted(folder.glob("*.jinja"))}, **CHAT_TEMPLATES}


def conversations(name: str) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """(messages, tools) by kind, in the form that the template reads."""
    kinds = {
        "system": ([SYSTEM, *TURNS], None),
        "no system": (TURNS, None),
        "calls": (CALLING, None),
        "calls and tools": (CALLING, TOOLS),
    }
    if not name.startswith(READ_PARTS_ONLY):
        return kinds
    return {kind: ([as_parts(m) for m in messages], tools) for kind, (messages, tools) in kinds.items()}


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def tokenizer_for(template: str) -> Any:
    """One token a byte, and the families' special tokens."""
    tokenizer = bpe_tokenizer(["a"], vocab_size=258, max_length=1 << 20)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template
    return tokenizer


def stops_of(name: str) -> tuple[str, str]:
    """(behind an answer, behind a call)."""
    stops = STOPS[max((family for family in STOPS if name.startswith(family)), key=len)]
    return stops[0], stops[-1]


def learned_of(tokenizer: Any, name: str, messages: list[dict[str, Any]], tools: Any) -> list[str] | str:
    """What is learned of each assistant's turn; or why there is nothing to learn."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        messages = _readable(tokenizer, messages, tools)
        whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        if missing := [text for text in _texts(messages, tools) if text not in whole]:
            return f"not written: {missing[0]}"
        return [_learned(tokenizer, name, messages[: i + 1], tools) for i in answers]
    except Exception as error:  # whatever a template raises
        return f"refused: {error}".split("\n")[0]


def _readable(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """With the arguments as JSON text, where the template cannot read an object."""
    try:
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        return messages
    except TypeError:
        text = {**_CALL, "function": {**_CALL["function"], "arguments": json.dumps({"harbour": "Bergen"})}}
        return [{**m, "tool_calls": [text]} if "tool_calls" in m else m for m in messages]


def _learned(tokenizer: Any, name: str, messages: list[dict[str, Any]], tools: Any) -> str:
    stop = stops_of(name)["tool_calls" in messages[-1]]
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    if re.search(r"\{%-? *generation *-?%\}", tokenizer.chat_template):
        learned, behind = _marked(tokenizer, messages, tools, whole)
    else:
        prompt = tokenizer.apply_chat_template(messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
        learned, behind = tokenizer.decode(tokens[1][len(os.path.commonprefix(tokens)) :]), ""
        learned = learned[: learned.rfind(stop) + len(stop)] if stop in learned else learned
    if stop not in learned:
        return learned + behind[: behind.find(stop)] + stop
    end = learned.rfind(stop) + len(stop)
    rest = learned[end:]
    return learned[:end] + rest[: len(rest) - len(rest.lstrip())]


def _marked(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, whole: str) -> tuple[str, str]:
    """(what is marked of the last message, what follows it)."""
    marked = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    before = messages[-2]["content"]
    before = before if isinstance(before, str) else before[0]["text"]
    start = len(tokenizer(whole[: whole.rfind(before) + len(before)], add_special_tokens=False)["input_ids"])
    places = [place for place, is_marked in enumerate(mask) if is_marked and place >= start]
    return tokenizer.decode([ids[place] for place in places]), tokenizer.decode(ids[places[-1] + 1 :])


def _texts(messages: list[dict[str, Any]], tools: Any) -> list[str]:
    contents = [message["content"] for message in messages]
    said = [content if isinstance(content, str) else content[0]["text"] for content in contents]
    called = ["Bergen"] if any("tool_calls" in message for message in messages) else []
    return [*said, *called, *(["Height of the tide"] if tools else [])]


def golden() -> dict[str, Any]:
    found = {}
    for name, template in templates().items():
        tokenizer = tokenizer_for(template)
        found[name] = {
            "stops": list(stops_of(name)),
            **{kind: learned_of(tokenizer, name, *given) for kind, given in conversations(name).items()},
        }
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
