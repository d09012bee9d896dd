"""The settings of supervised runs: defaults, and what is refused from the config alone."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config.load import apply_override, on_device, parse_config
from rlhf_ray.config.supervised import SCHEMAS, SupervisedConfig
from rlhf_ray.errors import ConfigError


def parse(command: str, *overrides: str) -> SupervisedConfig:
    tree: dict[str, Any] = {"model": {"path": "some/model"}, "data": {"path": "rows.jsonl"}}
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, SCHEMAS[command], source="the test")


def test_each_command_has_its_usual_rate_whatever_else_is_set():
    assert [parse(c, "learner.batch_size=8").learner.lr for c in SCHEMAS] == [1e-5, 1e-5, 5e-7, 1e-5]
    assert [parse(c).name for c in SCHEMAS] == list(SCHEMAS)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("sft", ["learner.world_size=2"], "executor=local is one process, learner.world_size=2 is not"),
        ("sft", ["learner.world_size=4", "learner.batch_size=2"], "ranks share learner.batch_size=2, so some would"),
        ("sft", ["eval.patience=1"], "there are no rows to validate on; set data.eval_size or data.eval_path"),
        ("sft", ["plain_text={share: 0.01, data: {path: x}}"], "is 0 rows, so one of the two kinds would be missing"),
        ("sft", ["plain_text={share: 0.1, data: {path: x}}", "model.path=scratch:gpt2", "data.max_length=16",
                 "model.tokenizer.path=scratch:char"], "plain_text.data.max_length=2048 exceeds model.scratch.max"),
        ("sft", ["model.path=scratch:bert", "model.tokenizer.path=scratch:char"], "scratch:bert is not a built-in"),
        ("sft", ["model.path=scratch:gpt2", "model.tokenizer.path=scratch:char"], "max_length=2048 exceeds model.scr"),
        ("sft", ["model.lora.quantize=nf4", "learner.engine=deepspeed"], "ZeRO would cut the packed bytes to pieces"),
        ("dpo", ["dpo.kind=ipo", "dpo.label_smoothing=0.1"], "dpo.kind=ipo has no such term"),
        ("dpo", ["dpo.kind=simpo", "dpo.label_smoothing=0.1"], "dpo.kind=simpo has no such term"),
        ("dpo", ["dpo.kind=orpo", "dpo.reference=runs/sft/model"], "dpo.kind=orpo has no reference; remove"),
        ("dpo", ["dpo.kind=orpo", "dpo.nll_weight=1"], "orpo's loss has such a term already"),
        ("dpo", ["dpo.kind=kto", "learner.batch_size=1"], "answers to the other prompts of a batch, and learner.batch"),
        ("dpo", ["dpo.kind=kto", "dpo.nll_weight=1"], "kto's loss has no such term"),
        ("dpo", ["dpo.undesirable_weight=2"], "dpo.undesirable_weight belongs to kto, and dpo.kind=sigmoid learns"),
        ("dpo", ["dpo.label_smoothing=0.5"], "less than 0.5"),
        ("dpo", ["dpo.bta=0.5"], "dpo.bta: unknown key; did you mean dpo.beta?"),
        ("classifier", ["classifier.frozen_layers=1", "model.lora.r=2"], "LoRA freezes every layer and adapts it"),
        ("classifier", ["classifier.frozen_layers=1", "model.path=scratch:bert", "model.tokenizer.path=scratch:char",
                        "data.max_length=16"], "would keep random numbers for ever"),
    ],
)  # fmt: skip
def test_contradictions(command, overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(command, *overrides)


def test_a_bert_may_judge():
    for command in ("rm", "classifier"):
        parse(command, "model.path=scratch:bert", "model.tokenizer.path=scratch:char", "data.max_length=16")


def test_all_problems_at_once_and_those_of_the_device():
    with pytest.raises(ConfigError, match="3 problems"):
        parse("dpo", "dpo.kind=ipo", "dpo.label_smoothing=0.1", "eval.patience=1", "learner.offload=optimizer")
    config = parse("rm", "learner.engine=deepspeed")
    on_device(config, "cuda")
    with pytest.raises(ConfigError, match="device=auto, which is mps here: 1 problem\n.*no MPS backend"):
        on_device(config, "mps")
