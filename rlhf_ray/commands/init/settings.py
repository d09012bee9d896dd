"""The YAML that `rlhf-ray init` writes: the few settings that matter, each with a comment that says what it is for."""

from __future__ import annotations

import json
import math
from typing import Any

from rlhf_ray.commands.init.look import Look
from rlhf_ray.commands.init.wishes import Wishes, reward_args
from rlhf_ray.config import dialect

_COMMENT_COLUMN = 36
# A token that is learned from the file itself is about three bytes; a short text has less of them.
_BYTES_PER_TOKEN = 2
_TEMPLATE_TOKENS = 96  # what a chat or instruction template adds
_LONGEST_SCRATCH, _LONGEST = 512, 1024
_HELD_OUT = 64


class _Page:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self._indent = ""

    def section(self, name: str = "", *, item: bool = False) -> None:
        """What follows stands in it; without a name: at the top."""
        self._indent = "  - " if item else "  " if name else ""
        if name:
            self.lines += ["", f"{name}:"]

    def set(self, key: str, value: Any, comment: str = "") -> None:
        shown = "" if isinstance(value, dict) else f" {written(value)}"
        line = f"{self._indent}{key}:{shown}"
        self.lines.append(f"{line:<{_COMMENT_COLUMN}} # {comment}" if comment else line)
        self._indent = self._indent.replace("-", " ")
        if isinstance(value, dict):
            self.lines += [f"{self._indent}  {name}: {written(inner)}" for name, inner in value.items()]

    def note(self, text: str) -> None:
        """A setting that is left to the reader to take."""
        self.lines.append(f"{self._indent}# {text}")


def written(value: Any) -> str:
    """A value as YAML reads it back. Texts are quoted only where they would be read as something else."""
    if isinstance(value, str):
        try:
            plain = dialect.read(f"a: {value} # b") == {"a": value}
        except Exception:  # whatever YAML makes of it, it is not this text
            plain = False
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def page_of(wishes: Wishes) -> str:
    """The whole file."""
    page, command = _Page(), wishes.command
    page.lines += [
        "# Written by `rlhf-ray init`. To look at it without running it, and to run it:",
        f"#   rlhf-ray {command} {wishes.out} --dry-run",
        f"#   rlhf-ray {command} {wishes.out}",
        "# Any setting can be changed on the command line too: learner.lr=1e-5 --run-dir runs/second. A setting that",
        "# is not here has its default; --dry-run prints them all.",
    ]
    page.set("name", wishes.out.stem, "of the folder in runs/")
    page.set("seed", 0, "the same seed gives the same run")
    page.set("executor", wishes.where, "local: one process; ray: workers on a Ray cluster (docs/cluster.md)")
    page.set("device", "auto", "cuda, mps or cpu: what is here")
    if command == "rl":
        page.set("steps", 100, "updates of the policy")
    else:
        page.set("epochs", 3 if wishes.from_scratch else 1, "times that each row is learned")
    _model(page, wishes)
    (_rl if command == "rl" else _supervised)(page, wishes)
    if wishes.where == "ray":
        _ray(page, wishes)
    page.section("checkpoint")
    page.set("every", 50, "steps; --resume auto goes on from the newest one")
    return "\n".join(page.lines) + "\n"


def _model(page: _Page, wishes: Wishes) -> None:
    page.section("model")
    if wishes.from_scratch:
        page.set("path", wishes.model, "built on the spot, and knows nothing yet; or a folder, or a Hub name")
        page.set("tokenizer", {"path": "scratch:bpe", "vocab_size": 2000}, "learned from the data; others have one")
        page.set("scratch", _scratch(wishes), "sizes; max_length: longest sequence, in tokens")
    else:
        page.set("path", wishes.model, "a folder or a Hub name")
        page.note("lora: {r: 16, alpha: 32} # learn a small adapter instead of all weights: much less memory")


def _scratch(wishes: Wishes) -> dict[str, int]:
    attention = {} if wishes.model == "scratch:lstm" else {"heads": 4}
    return {"hidden_size": 128, "layers": 2, **attention, "max_length": _sequence_length(wishes)}


def _rows(page: _Page, wishes: Wishes) -> None:
    data = wishes.data
    page.section("data")
    seen = f"{data.rows} rows of type {data.kind}" if data.kind else "a dataset of the Hub"
    page.set("path", data.source, f"{seen}; relative to where the command is given")
    if wishes.names and wishes.command != "rl":
        page.set("columns", dict(wishes.names), "which column is which")
    if data.is_chat and wishes.from_scratch:
        page.set("chat_template", "zephyr", "how messages become text; a real model brings its own")
    elif not wishes.from_scratch and data.kind in ("prompt", "prompt_completion") and not data.is_chat:
        page.note("template: chat # for a model with a chat template: a plain prompt becomes the user's message")


def _rl(page: _Page, wishes: Wishes) -> None:
    data, scratch = wishes.data, wishes.from_scratch
    held_out = _held_out(data)
    prompts = min(8, data.rows - held_out) if data.kind else 8
    _rows(page, wishes)
    field = dict(wishes.names).get("prompt", "text" if data.is_text else None)
    if field:
        page.set("field", field, "the column with the prompt")
    if data.is_text:
        page.set("prompt_words", 4, "the prompt is the beginning of each text; the model writes on")
    page.set("max_prompt_tokens", _prompt_length(wishes), "of a longer prompt, overlong_prompts says what happens")
    page.set("overlong_prompts", "drop", "they are counted; error: refuse the run")
    page.set("eval_size", held_out, "prompts that are held out, and asked before and after")
    if scratch and (data.answer or data.is_text):
        page.section("warm_start")
        if data.answer:
            page.set("completion", data.answer, "the column with an answer to learn from")
        page.set("steps", 200, "supervised steps first: a model from nothing would only babble")
        page.set("batch_size", 16)
        page.set("lr", 0.002)
        page.set("max_length", _sequence_length(wishes), "tokens of prompt and answer; longer ones are cut")
    page.section("rollout")
    page.set("prompts_per_step", prompts)
    page.set("group_size", 8, "answers to each prompt, which are compared with each other")
    page.set("max_new_tokens", _answer_length(wishes), "of an answer; raise it where many are cut (truncated_frac)")
    page.set("temperature", 1.0)
    _reward(page, wishes)
    page.section("algorithm")
    page.set("name", "grpo", "or ppo, rloo, dapo, gspo, ... (docs/algorithms.md)")
    page.set("kl_coef", 0.0, "above 0, say 0.05, it stays nearer to the model that it began as")
    page.section("learner")
    page.set("lr", 3e-4 if scratch else 1e-6, "of a pretrained model 1e-6; with LoRA 1e-5" if not scratch else "")
    page.set("tokens_per_microbatch", 4096, "less needs less memory, and changes no number")
    page.section("eval")
    page.set("size", held_out, "of the held-out prompts, so many are asked")
    page.set("every", 25, "steps; 0: only before and after")


def _reward(page: _Page, wishes: Wishes) -> None:
    if wishes.reward is not None:
        page.section("rewards", item=True)
        what = "your own function" if wishes.own_reward else "built in" if ":" not in wishes.reward else "yours"
        page.set("function", wishes.reward, f"{what} (docs/rewards.md); several are added up")
        page.set("weight", 1.0)
        if args := reward_args(wishes.reward, wishes.data):
            page.set("args", args, "its settings")
        page.set("on_failure", "raise", "or drop_group, default, retry: when it raises or gives no number")
    if wishes.reward_model is not None:
        page.section("reward_model")
        page.set("path", wishes.reward_model, "what `rlhf-ray rm` or `classifier` left, or a Hub name")
        page.set("output", "logit", "of the positive label; prob or logprob: between bounds")


def _supervised(page: _Page, wishes: Wishes) -> None:
    scratch = wishes.from_scratch
    held_out = _held_out(wishes.data)
    _rows(page, wishes)
    page.set("eval_size", held_out, "rows that are held out: they say when to stop, and are never learned")
    page.set("max_length", _sequence_length(wishes), "tokens of a whole sequence")
    page.set("overlong", "truncate", "what happens to a longer one; or drop, error")
    if wishes.command == "dpo":
        page.section("dpo")
        # No beta: a number here would be that of simpo too, whose own is twenty times as large.
        page.set("kind", "sigmoid", "DPO; or ipo, simpo, orpo, and kto for single answers (docs/supervised.md)")
        page.set("nll_weight", 0.0, "above 0, say 0.2, the better answers are learned by heart too")
    page.section("learner")
    left = wishes.data.rows - held_out if wishes.data.kind else 16
    page.set("batch_size", min(16, left), "rows of one update" if wishes.command == "sft" else "pairs of one update")
    page.set("lr", (1e-3 if wishes.command == "sft" else 3e-4) if scratch else _PRETRAINED_LR[wishes.command])
    page.set("tokens_per_microbatch", 4096, "less needs less memory, and changes no number")
    page.section("eval")
    page.set("patience", 2, "validations (one an epoch) without a better loss that end the run")


_PRETRAINED_LR = {"sft": 1e-5, "rm": 1e-5, "dpo": 5e-7}


def _ray(page: _Page, wishes: Wishes) -> None:
    page.section("ray")
    page.set("address", None, "empty: $RAY_ADDRESS, or a cluster that is started here for the run")
    page.note("learner.world_size=2 and generator.count=2 take more GPUs" if wishes.command == "rl" else
              "learner.world_size=2 takes more GPUs")


def _held_out(data: Look) -> int:
    """A tenth of the rows, but one at least."""
    return min(_HELD_OUT, max(1, data.rows // 10)) if data.kind else _HELD_OUT


def _tokens(size: int, longest: int) -> int:
    """As many as `size` bytes of text surely are, and a template around them; a multiple of 32."""
    return min(longest, 32 * math.ceil((size / _BYTES_PER_TOKEN + _TEMPLATE_TOKENS) / 32))


def _longest(wishes: Wishes, otherwise: int) -> int:
    """The longest sequence, in tokens."""
    return _LONGEST_SCRATCH if wishes.from_scratch else min(otherwise, wishes.positions or otherwise)


def _prompt_length(wishes: Wishes) -> int:
    most = _longest(wishes, _LONGEST + _answer_length(wishes)) - _answer_length(wishes)
    if wishes.data.kind is None:
        return most
    return min(most, 32) if wishes.data.is_text else _tokens(wishes.data.longest_prompt, most)


def _answer_length(wishes: Wishes) -> int:
    return 48 if wishes.from_scratch else min(256, _longest(wishes, _LONGEST) // 2)


def _sequence_length(wishes: Wishes) -> int:
    """Of a prompt and its answer."""
    if wishes.command == "rl":
        return _prompt_length(wishes) + 2 * _answer_length(wishes)
    longest = _longest(wishes, 2 * _LONGEST)
    return _tokens(wishes.data.longest_text, longest) if wishes.data.kind else min(longest, _LONGEST)
