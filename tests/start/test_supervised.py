"""Whole supervised runs, small: every command from its config to a folder that somebody else can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.config.load import apply_override, parse_config
from rlhf_ray.config.rewards import RewardModelConfig
from rlhf_ray.config.supervised import SCHEMAS, SupervisedConfig
from rlhf_ray.errors import CheckpointError, ConfigError, DataError, RlhfRayError
from rlhf_ray.models.loading import load_reward_model
from rlhf_ray.roles.reward import RewardModel
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.start.supervised import doubt_judge, run_supervised

pytestmark = pytest.mark.slow

ANSWERS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(5)]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "0"} for a in range(1, 6) for b in range(5)]
LABELLED = [{"text": f"{a}{b}{a}", "label": int(a > 4)} for a in range(10) for b in range(4)]
# Far too high a rate.
OVERFITTING = ("epochs=40", "eval.every=2", "eval.patience=3", "learner.lr=0.05", "learner.lr_schedule=constant")
ROWS = {"sft": ANSWERS, "rm": PAIRS, "dpo": PAIRS, "classifier": LABELLED}


@pytest.fixture
def config(tmp_path):
    """`config("sft", "steps=3")`: a run of a second, with these overrides."""

    def make(command: str, *overrides: str) -> SupervisedConfig:
        data = tmp_path / f"{command}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[command]))
        tree: dict[str, Any] = {
            "name": command,
            "device": "cpu",
            "epochs": 2,
            "model": {
                "path": "scratch:bert" if command == "classifier" else "scratch:qwen2",
                "tokenizer": {"path": "scratch:char"},
                "scratch": {"hidden_size": 16, "layers": 2, "heads": 2, "max_length": 16},
            },
            "data": {"path": str(data), "eval_size": 8, "max_length": 16},
            "learner": {"batch_size": 8, "lr": 1e-2},
            "logging": {"loggers": []},
        }
        for override in overrides:
            apply_override(tree, override)
        return parse_config(tree, SCHEMAS[command], source="the test")

    return make


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path, factory: Any = AutoModelForCausalLM) -> dict[str, torch.Tensor]:
    return factory.from_pretrained(folder / "model").state_dict()


def steady(row: dict[str, float]) -> dict[str, float]:
    """What does not depend on the clock."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "perf/", "cost/"))}


# ---- LoRA's adapter beside the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_lora_run_leaves_its_adapter_too(config, tmp_path, command):
    from peft import PeftModel

    run_supervised(config(command, "model.lora.r=2", "steps=2"), tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "start")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "start")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")(ids).logits
        torch.testing.assert_close(adapted(ids).logits, merged, atol=1e-5, rtol=0)
    assert (merged - before).abs().max() > 1e-4


@pytest.mark.parametrize("command", ["rm", "classifier"])
def test_a_new_head_is_in_no_adapter_so_there_is_none(config, tmp_path, command):
    run_supervised(config(command, "model.lora.r=2", "steps=1"), tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "run" / "adapter").exists()


# ---- each command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_a_run_leaves_what_the_specification_says(config, tmp_path, command):
    summary = run_supervised(config(command), tmp_path / "run")
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model"):
        assert (run / name).exists(), name
    assert summary["status"] == "finished" and summary["seconds"] > 0
    rows = metrics_of(run)
    # 30 - 8, 25 - 8, 40 - 8 rows in batches of 8: 3 or 4 steps an epoch, two epochs.
    assert summary["steps"] == len(rows) == (8 if command == "classifier" else 6)
    assert {"loss", "grad_norm", "lr", "perf/tokens_per_s", "time/step"} <= set(rows[0])
    assert [row["step"] for row in rows if "val/loss" in row] == [len(rows) // 2, len(rows)]
    for when in ("before", "after"):
        assert {"train/loss", "val/loss"} <= set(summary[when])
    assert summary["after"]["train/loss"] < summary["before"]["train/loss"]


def test_sft_shows_samples_before_and_after(config, tmp_path):
    summary = run_supervised(config("sft", "samples.count=3", "steps=4"), tmp_path / "run")
    before, after = summary["before"]["samples"], summary["after"]["samples"]
    assert [sample["prompt"] for sample in before] == [sample["prompt"] for sample in after]
    assert len(after) == 3 and all(sample["prompt"].endswith("=") for sample in after)
    assert {"perplexity", "token_accuracy"} <= {name.partition("/")[2] for name in summary["after"]}


def test_sft_prints_samples_every_so_often(config, tmp_path, capsys):
    run_supervised(config("sft", "samples.count=2", "steps=4", "logging.samples_every=2"), tmp_path / "run")
    out = capsys.readouterr().out
    assert "step 2: samples\n" in out and "step 4: samples" not in out, "those of the end are in the table"
    assert "[none]" not in out, "nobody has judged them"
    run_supervised(config("sft", "samples.count=2", "steps=4", "logging.samples_every=0"), tmp_path / "none")
    assert ": samples" not in capsys.readouterr().out
    run_supervised(config("rm", "steps=4", "logging.samples_every=1"), tmp_path / "rm")
    assert ": samples" not in capsys.readouterr().out


def test_a_reward_model_comes_from_the_sft_model_and_judges_text(config, tmp_path):
    """SFT -> RM -> the reward role, whose scores are those that training saw."""
    run_supervised(config("sft"), tmp_path / "sft")
    start = [f"model.path={tmp_path}/sft/model", "model.tokenizer.path=null"]
    summary = run_supervised(config("rm", *start, "epochs=12", "eval.keep_best=false"), tmp_path / "rm")
    assert summary["after"]["train/accuracy"] > 0.9
    assert {"val/ece", "val/length_correlation", "val/score_histogram", "train/accuracy"} <= set(summary["after"])
    folder = str(tmp_path / "rm" / "model")
    model, tokenizer = load_reward_model(folder)
    assert model.config.num_labels == 1
    judge = RewardModel(model, tokenizer, RewardModelConfig(path=folder))
    scores = [judge.score([f"{row['prompt']}{row[side]}" for row in PAIRS]).values for side in ("chosen", "rejected")]
    right = sum(good > bad for good, bad in zip(*scores, strict=True)) / len(PAIRS)
    assert right > 0.8
    inside = weights_of(tmp_path / "sft")["model.embed_tokens.weight"]
    assert inside.shape == model.state_dict()["model.embed_tokens.weight"].shape


@pytest.mark.parametrize(
    ("accuracy", "correlation", "expected"),
    [
        (0.59, 0.0, ["weak_judge: on held-out pairs it agrees with the labels 59% of the time"]),
        (0.9, 0.7, ["length_bias: its scores correlate with the answers' length (+0.70), so a policy would learn to "
                    "write longer answers"]),
        (0.9, -0.7, ["length_bias: its scores correlate with the answers' length (-0.70), so a policy would learn to "
                     "write shorter answers"]),
        (0.6, 0.6, []),
        (None, None, []),
    ],
)  # fmt: skip
def test_a_judge_of_no_use_is_an_alarm(accuracy, correlation, expected):
    heard: list[str] = []
    run = SimpleNamespace(alarm=lambda kind, reason, step: heard.append(f"{kind}: {reason} (step {step})"))
    after = {} if accuracy is None else {"val/accuracy": accuracy, "val/length_correlation": correlation}
    doubt_judge({"after": after, "kept_step": 7}, run)
    assert len(heard) == len(expected)
    for said, beginning in zip(heard, expected, strict=True):
        assert said.startswith(beginning) and said.endswith("(step 7)")


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_every_model_from_scratch_can_be_tuned_and_judge(config, tmp_path, kind):
    summary = run_supervised(config("sft", f"model.path=scratch:{kind}"), tmp_path / "sft")
    assert summary["after"]["train/loss"] < summary["before"]["train/loss"]
    start = [f"model.path={tmp_path}/sft/model", "model.tokenizer.path=null"]
    run_supervised(config("rm", *start), tmp_path / "rm")
    assert load_reward_model(tmp_path / "rm" / "model")[0].config.num_labels == 1


def test_a_classifier_is_a_reward_model_and_keeps_its_frozen_layers(config, tmp_path):
    run_supervised(config("classifier", "classifier.labels=[low,high]"), tmp_path / "first")
    first = weights_of(tmp_path / "first", AutoModelForSequenceClassification)
    start = [f"model.path={tmp_path}/first/model", "model.tokenizer.path=null", "classifier.labels=[low,high]"]
    run_supervised(config("classifier", *start, "classifier.frozen_layers=1", "seed=1"), tmp_path / "second")
    second = weights_of(tmp_path / "second", AutoModelForSequenceClassification)
    same = {name for name in first if torch.equal(first[name], second[name])}
    frozen = {name for name in first if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))}
    assert same == frozen
    model, tokenizer = load_reward_model(tmp_path / "second" / "model")
    assert model.config.id2label == {0: "low", 1: "high"}
    judge = RewardModel(model, tokenizer, RewardModelConfig(path="x", output="prob"))
    low, high = judge.score(["010", "919"]).values
    assert 0 <= low < high <= 1


def test_lora_trains_a_policy_and_a_reward_model(config, tmp_path):
    pytest.importorskip("peft")
    run_supervised(config("sft", "model.lora.r=2"), tmp_path / "sft")
    folders = (tmp_path / "sft" / name for name in ("start", "model"))
    start, end = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all("proj" in name for name in changed), "adapters are merged into linear layers, and only there"
    summary = run_supervised(config("rm", "model.lora.r=2"), tmp_path / "rm")
    assert summary["after"]["train/loss"] < summary["before"]["train/loss"]
    load_reward_model(tmp_path / "rm" / "model")


def test_qlora_trains_a_reward_model_whose_folder_is_not_packed(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = ["model.scratch.hidden_size=64", "model.lora={r: 2, quantize: nf4}"]
    summary = run_supervised(config("rm", *wide), tmp_path / "run")
    assert summary["after"]["train/loss"] < summary["before"]["train/loss"]
    model, _ = load_reward_model(tmp_path / "run" / "model")
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_plain_text_is_mixed_in_by_its_share(config, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i}={i}"}) + "\n" for i in range(9)))
    mixed = config("sft", f"plain_text.data.path={text}", "plain_text.data.max_length=16", "plain_text.share=0.25")
    assert mixed.plain_text_rows == 2
    summary = run_supervised(mixed, tmp_path / "run")
    # 22 rows of data, 6 of them a step: 4 steps an epoch.
    assert summary["steps"] == 8


# ---- validation -----------------------------------------------------------------------------------------------


def test_early_stopping_goes_back_to_the_best_weights(config, tmp_path):
    """The loss falls, then rises; what is exported is what validated best."""
    summary = run_supervised(config("classifier", *OVERFITTING), tmp_path / "run")
    rows = [row for row in metrics_of(tmp_path / "run") if "val/loss" in row]
    best = min(rows, key=lambda row: row["val/loss"])
    assert summary["stopped_early"] and summary["steps"] == rows[-1]["step"] == best["step"] + 6
    assert summary["kept_step"] == best["step"]
    assert summary["after"]["val/loss"] == pytest.approx(best["val/loss"], rel=1e-6)


def test_the_test_rows_are_judged_before_and_after_and_decide_nothing(config, tmp_path):
    held = tmp_path / "test.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in LABELLED[:10]))
    summary = run_supervised(config("classifier", f"eval.test_path={held}"), tmp_path / "run")
    assert {"test/loss", "test/accuracy"} <= set(summary["before"]) & set(summary["after"])
    assert not any("test/loss" in row for row in metrics_of(tmp_path / "run"))


# ---- resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(config, tmp_path, monkeypatch, command):
    settings = ["checkpoint.every=2", "learner.weight_decay=0.1"]
    run_supervised(config(command, *settings), tmp_path / "whole")
    real = Checkpoints.save

    def save(self, step, *arguments):
        real(self, step, *arguments)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run_supervised(config(command, *settings), tmp_path / "parts")
    monkeypatch.setattr(Checkpoints, "save", real)
    run_supervised(config(command, *settings), tmp_path / "parts", resume=True)
    rows = [list(map(steady, metrics_of(tmp_path / name))) for name in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_refuses_other_rows(config, tmp_path):
    run_supervised(config("sft", "steps=2"), tmp_path / "run")
    with pytest.raises(ConfigError, match="learner.batch_size has changed"):
        run_supervised(config("sft", "steps=4", "learner.batch_size=4"), tmp_path / "run", resume=True)


@pytest.mark.parametrize("command", ["sft", "rm", "dpo", "classifier"])
def test_resume_refuses_rows_that_have_changed(config, tmp_path, command):
    """Of the training data, of the held-out rows and of the test rows; a changed number of epochs is told."""
    whole, run = config(command, "epochs=1", "checkpoint.every=1"), tmp_path / "run"
    data = Path(whole.data.path)
    others = {name: tmp_path / f"{name}.jsonl" for name in ("held", "test")}
    for path in others.values():
        path.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    settings = [f"data.eval_path={others['held']}", f"eval.test_path={others['test']}", "data.eval_size=0"]
    run_supervised(config(command, "steps=1", *settings), run)
    for path in (data, *others.values()):
        content = path.read_text()
        longer = config(command, "steps=2", *settings)  # which writes the training data anew
        path.write_text("".join(content.splitlines(keepends=True)[::-1]))
        with pytest.raises(DataError, match=rf"run: the data has changed .*: {path} .*restore the data, or start anew"):
            run_supervised(longer, run, resume=True)
        path.write_text(content)
    assert run_supervised(config(command, "steps=2", *settings), run, resume=True)["steps"] == 2
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert "steps 1 -> 2" in next(event["reason"] for event in events if event["event"] == "length_changed")


def test_resume_refuses_another_chat_template_in_the_same_file(config, tmp_path):
    template, run = tmp_path / "chat.jinja", tmp_path / "run"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    settings = ("data.template=chat", f"data.chat_template={template}", "checkpoint.every=1")
    run_supervised(config("sft", "steps=1", *settings), run)
    run_supervised(config("sft", "steps=2", *settings), run, resume=True)
    template.write_text("{% for m in messages %}{{ m.content }}={% endfor %}")
    with pytest.raises(DataError, match="the chat template, so the same rows would be other texts"):
        run_supervised(config("sft", "steps=3", *settings), run, resume=True)


def test_resume_refuses_plain_text_that_has_changed_or_is_new(config, tmp_path):
    plain, run = tmp_path / "plain.jsonl", tmp_path / "run"
    plain.write_text("".join(json.dumps({"text": f"{n}+{n}"}) + "\n" for n in range(8)))
    settings = [f"plain_text.data.path={plain}", "plain_text.data.max_length=16", "plain_text.share=0.5"]
    run_supervised(config("sft", "steps=1", *settings), run)
    plain.write_text(plain.read_text().replace("7+7", "7+8"))
    with pytest.raises(DataError, match=rf"the data has changed .*: {plain} .8 rows as before"):
        run_supervised(config("sft", "steps=2", *settings), run, resume=True)
    with pytest.raises(ConfigError, match="plain_text has changed"):
        run_supervised(config("sft", "steps=2"), run, resume=True)


def test_the_best_weights_outlive_newer_checkpoints_and_their_loss_is_told(config, tmp_path):
    settings = [*OVERFITTING, "checkpoint.every=2", "checkpoint.keep=1"]
    summary = run_supervised(config("classifier", *settings), tmp_path / "run")
    checkpoints, kept = tmp_path / "run" / "checkpoints", summary["kept_step"]
    steps = sorted(int(folder.name.removeprefix("step_")) for folder in checkpoints.glob("step_*"))
    assert steps == [kept, summary["steps"]] and kept == summary["steps"] - 6
    (checkpoints / f"step_{kept}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"step_{kept}: has no manifest.json"):
        run_supervised(config("classifier", *settings), tmp_path / "run", resume=True)
    shutil.rmtree(checkpoints / f"step_{kept}")
    with pytest.warns(UserWarning, match=f"the checkpoint of step {kept}, which had the best weights, is gone"):
        run_supervised(config("classifier", *settings), tmp_path / "run", resume=True)


# ---- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "overrides", "kind", "message"),
    [
        ("sft", ["data.path=gone.jsonl"], DataError, "gone.jsonl: no such file"),
        ("sft", ["data.max_length=4"], DataError, "data.max_length|data.overlong"),
        ("rm", ["model.path=./gone", "model.tokenizer.path=null"], RlhfRayError, "gone: no such folder"),
        ("classifier", ["classifier.labels=[only]"], DataError, "has the label 1, and classifier.labels names 1"),
    ],
)
def test_bad_input_leaves_no_folder(config, tmp_path, command, overrides, kind, message):
    with pytest.raises(kind, match=message):
        run_supervised(config(command, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_model(config, tmp_path):
    run_supervised(config("sft", "steps=1", "model.scratch.max_length=6", "data.max_length=6"), tmp_path / "short")
    start = [f"model.path={tmp_path}/short/model", "model.tokenizer.path=null"]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"prompt": "1+1=", "completion": "22222", "n": i}) + "\n" for i in range(3)))
    message = "longest row has 10 tokens, and .* has 6 positions; set data.max_length=6"
    with pytest.raises(ConfigError, match=message):
        run_supervised(config("sft", *start, f"data.path={long}", "data.eval_size=0"), tmp_path / "run")
