"""The whole loop, locally, on a model of a few thousand weights."""

import json
import math
import re
import signal
import threading
import time
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.errors import ConfigError, DivergenceError, RewardError, Terminated
from rlhf_ray.roles import factory
from rlhf_ray.roles.critic import Critic
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.learner import Learner
from rlhf_ray.rollout.ledger import TERMS
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start import rl as start
from rlhf_ray.start.rl import run_rl

pytestmark = pytest.mark.slow

PPO = (
    "algorithm.name=ppo", "algorithm.kl_controller=adaptive", "algorithm.kl_horizon=64", "algorithm.kl_target=0.01",
    "algorithm.normalize_rewards=running", "learner.minibatches=2", "learner.epochs=2", "critic.lr=1e-2",
)  # fmt: skip


def rollout_files(run_dir) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted((run_dir / "rollouts").glob("*.jsonl"))}


def weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- one run, looked at from all sides ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo_run(tiny_config, tmp_path_factory):
    """(folder, summary) of three steps with critic, reference, adaptive KL and evaluations. Read only."""
    folder = tmp_path_factory.mktemp("ppo") / "run"
    config = tiny_config(*PPO, "eval.every=2", "logging.rollouts=5", "checkpoint.every=2", "checkpoint.keep=3")
    return folder, run_rl(config, folder)


def test_the_metrics_are_there_by_their_names(ppo_run):
    rows = [json.loads(line) for line in (ppo_run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    wanted = {
        "reward/mean", "reward/std", "reward/min", "reward/max", "reward/repetition_penalty", "groups/all_correct",
        "groups/all_wrong", "groups/mixed", "response_len/mean", "response_len/max", "truncated_frac", "loss/policy",
        "loss/value", "loss/kl", "loss/entropy", "entropy", "ratio/mean", "ratio/max", "clipfrac", "approx_kl",
        "kl_ref", "kl_coef",
        "advantage/mean", "advantage/std", "grad_norm", "lr", "value/explained_variance", "mismatch/kl",
        "mismatch/absdiff_mean", "mismatch/absdiff_max", "mismatch/ess", "sync/canary_absdiff", "sync/gb_per_s",
        "staleness/mean", "staleness/max", "dropped_stale", "time/step", "time/generate", "time/reward",
        "time/ref_logp", "time/old_logp", "time/values", "time/update", "time/weight_sync", "time/wait", "time/ckpt",
        "time/eval", "perf/tokens_per_s", "perf/samples_per_s", "perf/mfu", "perf/peak_mem_gb", "perf/padding_frac",
        "fault/restarts", "fault/retries", "fault/dropped", "cost/device_hours",
    }  # fmt: skip
    for row in rows:
        assert not wanted - set(row), row["step"]
        assert all(math.isfinite(value) for value in row.values())
        assert row["sync/canary_absdiff"] < 1e-5 and row["mismatch/absdiff_max"] < 1e-5
        assert row["staleness/max"] == 0 and 0 <= row["perf/padding_frac"] < 1 and 0 < row["perf/mfu"] < 1
        assert row["loss/entropy"] < 0, "of the terms, without their coefficients"
    assert 0 < rows[0]["cost/device_hours"] < rows[1]["cost/device_hours"] < rows[2]["cost/device_hours"]
    assert "eval/reward" in rows[1] and "eval/reward" not in rows[0]
    assert rows[1]["time/eval"] > 0 == rows[0]["time/eval"]
    assert rows[2]["time/ckpt"] > 0 == rows[1]["time/ckpt"], "of the checkpoint after step 2"


def names_on_the_page(text: str) -> list[str]:
    """The first column of docs/metrics.md: `/std` goes on from the name before it, `<function>` is any name."""
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                names.append(names[-1].rpartition("/")[0] + name if name.startswith("/") else name)
    return [name.replace("<function>", "*") for name in names]


def test_the_names_on_the_page_are_read_right():
    page = "| name | meaning |\n| --- | --- |\n| `a/mean` `/std`, `a/<function>` | `b`, `c` |\n| `d`, `e/*` | |\n`f`"
    assert names_on_the_page(page) == ["a/mean", "a/std", "a/*", "d", "e/*"]


def test_the_page_has_a_line_for_every_metric_and_no_other(ppo_run, tiny_config, tmp_path, repo_root):
    """The second run has what the first has not: groups to choose from, a penalty for length, a reward that
    fails, passes that may end early, rows that are learned beside the rollouts.
    """
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 3)
    rows = ("algorithm.sft_coef=0.1", f"sft_data={{path: '{tmp_path}/sums.jsonl', batch_size: 2, max_length: 16}}")
    (tmp_path / "judge.py").write_text("def judge(completions): return [float('nan'), *map(len, completions[1:])]")
    reward = f"{{function: '{tmp_path}/judge.py:judge', isolated: false, on_failure: default, default_score: 0}}"
    passes = ("learner.epochs=2", "learner.stop_kl=1")
    config = tiny_config("algorithm.name=dapo", f"rewards.0={reward}", *passes, *rows, "steps=1", "eval.size=2")
    run_rl(config, tmp_path / "dapo")
    files = (ppo_run[0] / "metrics.jsonl", tmp_path / "dapo" / "metrics.jsonl")
    emitted = {name for file in files for line in file.read_text().splitlines() for name in json.loads(line)}
    page = names_on_the_page((repo_root / "docs" / "metrics.md").read_text(encoding="utf-8"))
    assert len(page) > 60
    assert [name for name in sorted(emitted) if not any(fnmatchcase(name, line) for line in page)] == [], "no line"
    assert [name for name in page if "*" not in name and name not in emitted] == [], "a line for what is never there"


def test_the_policy_starts_at_its_reference_and_leaves_it(ppo_run):
    rows = [json.loads(line) for line in (ppo_run[0] / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-5) and abs(rows[2]["kl_ref"]) > 1e-3
    # KL 0, target 0.01: the error is clipped to -0.2, and n/horizon = 16/64
    assert rows[0]["kl_coef"] == 0.05 and rows[1]["kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 0.25))


def test_the_run_directory(ppo_run):
    folder, summary = ppo_run
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["name"]) == ("finished", 3, "tiny")
    assert summary["seconds"] > 0 and summary["run_dir"] == str(folder)
    for when in ("before", "after"):
        assert {"reward", "response_len", "distinct_1", "samples"} <= set(summary[when])
    assert len(summary["before"]["samples"]) == 8 and summary["before"] != summary["after"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_2", "step_3"]
    assert {p.name for p in (folder / "checkpoints" / "step_3").iterdir()} == {
        "learner", "critic", "manifest.json", "state.pt", "beginning.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in rollout_files(folder)["step_3.jsonl"].splitlines()]
    assert len(rows) == 5 and set(rows[0]) == {
        "prompt_id", "prompt", "completion", "reward", "rewards", "tokens", "truncated",
    }  # fmt: skip
    assert [row["prompt_id"] for row in rows] == [8, 8, 8, 8, 9]
    resolved = (folder / "config.yaml").read_text()
    assert "advantage: gae" in resolved and "generator:\n  engine: hf" in resolved, "presets, and what auto stands for"


def test_the_model_is_a_plain_hugging_face_folder(ppo_run):
    model = AutoModelForCausalLM.from_pretrained(ppo_run[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(ppo_run[0] / "model")
    assert type(model).__name__ == "Qwen2ForCausalLM" and tokenizer("1+1=")["input_ids"]
    assert not same(weights(ppo_run[0]), load_file(ppo_run[0] / "start" / "model.safetensors"))


# ---- stop and go on -------------------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch):
    """Raise KeyboardInterrupt once: `before` a step's row is logged, or `after` it and before its checkpoint."""

    def arm(step: int, when: str) -> None:
        log = TrainingRun.log

        def interrupted(self, number, *args):
            if number != step:
                return log(self, number, *args)
            monkeypatch.setattr(TrainingRun, "log", log)
            if when == "after":
                log(self, number, *args)
            raise KeyboardInterrupt

        monkeypatch.setattr(TrainingRun, "log", interrupted)

    return arm


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("settings", [(), PPO], ids=["grpo", "ppo"])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_config, tmp_path, stop_at, read_rows, settings, when):
    config = tiny_config(*settings, "steps=4", "checkpoint.every=1", "eval.size=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_rl(config, whole)
    stop_at(3, when)
    with pytest.raises(KeyboardInterrupt):
        run_rl(config, parts)
    assert json.loads((parts / "summary.json").read_text())["status"] == "interrupted"
    resumed = run_rl(config, parts, resume=True)
    assert same(weights(whole), weights(parts))
    assert read_rows(parts) == read_rows(whole) and len(read_rows(parts)) == 4
    assert rollout_files(parts) == rollout_files(whole)
    assert resumed["before"] == expected["before"] and resumed["after"] == expected["after"]
    assert resumed["steps"] == 4
    events = [json.loads(line) for line in (parts / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [2]


def test_a_run_that_is_asked_to_stop_ends_its_step_with_a_checkpoint(tiny_config, tmp_path, read_rows, monkeypatch):
    """SIGTERM in the midst of step 2, and no checkpoint due before the end."""
    config = tiny_config("steps=3", "checkpoint.every=0", "eval.size=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_rl(config, whole)
    learn = Learner.learn

    def asked_to_stop(self, *args):
        if self.engine.steps == 1:
            signal.raise_signal(signal.SIGTERM)
        return learn(self, *args)

    monkeypatch.setattr(Learner, "learn", asked_to_stop)
    with pytest.raises(Terminated):
        run_rl(config, parts)
    monkeypatch.setattr(Learner, "learn", learn)
    summary = json.loads((parts / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 2)
    assert (parts / "checkpoints" / "latest").read_text() == "step_2\n"
    run_rl(config, parts, resume=True)
    assert same(weights(whole), weights(parts)) and read_rows(parts) == read_rows(whole)


def test_the_last_weights_of_a_stopped_run_depend_on_the_resume(tiny_config, tmp_path, read_rows):
    """The comparison above can fail: another seed gives other rows."""
    for seed in (0, 1):
        run_rl(tiny_config("steps=1", "eval.size=2", f"seed={seed}"), tmp_path / str(seed))
    assert read_rows(tmp_path / "0") != read_rows(tmp_path / "1")


def test_a_finished_run_may_go_on_for_more_steps(tiny_config, tmp_path, read_rows):
    run_rl(tiny_config("steps=1", "eval.size=2"), tmp_path / "a")
    summary = run_rl(tiny_config("steps=2", "eval.size=2"), tmp_path / "a", resume=True)
    assert summary["steps"] == 2 and [row["step"] for row in read_rows(tmp_path / "a")] == [1, 2]
    again = run_rl(tiny_config("steps=2", "eval.size=2"), tmp_path / "a", resume=True)
    assert again["status"] == "finished" and again["after"] == summary["after"], "nothing left to do"


@pytest.mark.parametrize(
    ("override", "named"),
    [("seed=5", "seed has"), ("model.scratch.layers=2", "model has"), ("warm_start.lr=1", "warm_start has")],
)
def test_a_run_does_not_go_on_with_another_policy(tiny_config, tmp_path, override, named):
    run_rl(tiny_config("steps=1", "eval.size=2"), tmp_path / "a")
    with pytest.raises(ConfigError, match=f"{named}.*set it back, or start anew"):
        run_rl(tiny_config("steps=2", "eval.size=2", override), tmp_path / "a", resume=True)


def test_a_fixed_kl_coefficient_may_be_changed_when_going_on(tiny_config, tmp_path, read_rows):
    run_rl(tiny_config("steps=1", "eval.size=2", "algorithm.kl_coef=0.1"), tmp_path / "a")
    run_rl(tiny_config("steps=2", "eval.size=2", "algorithm.kl_coef=0.3"), tmp_path / "a", resume=True)
    adaptive = tiny_config("steps=3", "eval.size=2", "algorithm.kl_coef=0.5", "algorithm.kl_controller=adaptive")
    run_rl(adaptive, tmp_path / "a", resume=True)
    assert [row["kl_coef"] for row in read_rows(tmp_path / "a")] == [0.1, 0.3, 0.3], "adaptive goes on from its state"


# ---- what belongs to an algorithm -----------------------------------------------------------------------------


def test_grpo_needs_no_reference_no_critic_and_no_second_forward_pass(tiny_config, tmp_path, read_rows, monkeypatch):
    for name in ("make_reference", "make_critic"):
        monkeypatch.setattr(factory, name, None)  # to make one would be an error
    monkeypatch.setattr(Learner, "logprobs", None)
    run_rl(tiny_config("steps=2", "eval.size=2"), tmp_path / "a")
    for row in read_rows(tmp_path / "a"):
        assert row["approx_kl"] == 0 and row["ratio/mean"] == 1 and row["ratio/max"] == 1
        assert row["grad_norm"] > 0 and "kl_ref" not in row


def test_the_first_step_is_exact_with_several_optimiser_steps_too(tiny_config, tmp_path, read_rows):
    run_rl(tiny_config("steps=1", "eval.size=2", "learner.minibatches=2", "learner.lr=1e-45"), tmp_path / "a")
    row = read_rows(tmp_path / "a")[0]
    assert row["approx_kl"] == 0 and row["ratio/max"] == 1 and row["mismatch/absdiff_max"] < 1e-5


def test_while_the_critic_warms_up_the_policy_rests(tiny_config, tmp_path, read_rows, monkeypatch):
    begun = []
    for role in (Critic, Learner):
        real = role.begin
        monkeypatch.setattr(
            role, "begin",
            lambda self, step, *rest, real=real, name=role.__name__: (
                begun.append((name, step)), real(self, step, *rest))[1],
        )  # fmt: skip
    options = ("algorithm.name=ppo", "steps=3", "eval.size=2", "critic.warmup_steps=2", "learner.lr_warmup_steps=2")
    config = tiny_config(*options)
    run_rl(config, tmp_path / "a")
    assert begun == [("Critic", 0), ("Critic", 1), ("Critic", 2), ("Learner", 2)]
    rows = read_rows(tmp_path / "a")
    assert ["loss/policy" in row for row in rows] == [False, False, True]
    assert rows[2]["lr"] == config.learner.lr / 2, "the first of two steps of its warm-up"
    assert all(row["loss/value"] > 0 for row in rows)
    assert [row["staleness/max"] for row in rows] == [0, 0, 0], "unchanged weights are not old ones"
    assert [row["kl_coef"] for row in rows] == [0.05] * 3


def test_an_overlapped_run_repeats_itself_and_goes_on(tiny_config, tmp_path, read_rows, monkeypatch, stop_at):
    """One process is refused this in a config (it gains nothing), but the machinery is the same as on Ray."""
    config = tiny_config("steps=5", "eval.size=2", "algorithm.correction=truncate", "checkpoint.every=2")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_staleness": 2})})
    monkeypatch.setattr(start, "on_device", lambda config, _: config)
    monkeypatch.setattr(start, "validated", lambda config: config)
    generate, one_at_a_time, pause = HFGenerator.generate, threading.Lock(), [0.0]

    def as_an_actor(self, *args):
        with one_at_a_time:
            time.sleep(pause[0])
            return generate(self, *args)

    monkeypatch.setattr(HFGenerator, "generate", as_an_actor)
    run_rl(config, tmp_path / "a")
    pause[0] = 0.05
    stop_at(4, "before")
    with pytest.raises(KeyboardInterrupt):
        run_rl(config, tmp_path / "b")
    run_rl(config, tmp_path / "b", resume=True)
    rows = read_rows(tmp_path / "a")
    assert read_rows(tmp_path / "b") == rows and rollout_files(tmp_path / "b") == rollout_files(tmp_path / "a")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert [row["staleness/max"] for row in rows] == [row["staleness/mean"] for row in rows] == [0, 1, 2, 2, 2]
    assert rows[1]["mismatch/absdiff_max"] > 1e-4 and rows[0]["mismatch/absdiff_max"] < 1e-5
    # After step k: its 16 answers, and those of two steps more, as far as there are any.
    assert [row["ledger/learned"] for row in rows] == [16, 32, 48, 64, 80]
    assert [row["ledger/open"] for row in rows] == [32, 32, 32, 16, 0]
    for row in rows:
        for unit in ("", "_tokens"):
            assert row[f"ledger/sampled{unit}"] == sum(row[f"ledger/{term}{unit}"] for term in TERMS) > 0


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_other_small_models(tiny_config, tmp_path, read_rows, kind):
    config = tiny_config(f"model.path=scratch:{kind}", *PPO, "steps=1", "eval.size=2")
    run_rl(config, tmp_path / "a")
    row = read_rows(tmp_path / "a")[0]
    assert row["sync/canary_absdiff"] < 1e-5 and row["mismatch/absdiff_max"] < 1e-5 and row["kl_ref"] < 1e-5


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_lora(tiny_config, tmp_path, read_rows, quantize):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    settings = ("model.lora.r=2", f"model.lora.quantize={quantize}", "learner.lr=0.01", "algorithm.kl_coef=0.01")
    run_rl(tiny_config(*settings, "steps=2", "eval.size=2"), tmp_path / "a")
    assert all(row["sync/canary_absdiff"] < 1e-5 for row in read_rows(tmp_path / "a"))
    first, second = (row["kl_ref"] for row in read_rows(tmp_path / "a"))
    assert abs(first) < 1e-6 < abs(second), "the policy without its adapter is the reference"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert not [name for name, _ in model.named_parameters() if "lora" in name], "merged"


# ---- trouble --------------------------------------------------------------------------------------------------


def test_an_exception_in_the_loop_ends_the_run_cleanly(tiny_config, tmp_path, monkeypatch, read_rows):
    reward, mended = tmp_path / "judge.py", tmp_path / "mended"
    reward.write_text(
        "from pathlib import Path\n"
        "calls = 0\n"
        "def judge(completions):\n"
        "    global calls\n"
        "    calls += 1\n"  # before, step 1, step 2
        f"    if calls == 3 and not Path({str(mended)!r}).exists(): raise ZeroDivisionError('no answers')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    closed = []
    monkeypatch.setattr(HFGenerator, "close", lambda self: closed.append(self))
    settings = (f"rewards.0={{function: '{reward}:judge'}}", "checkpoint.every=1", "eval.size=2")
    with pytest.raises(RewardError, match="ZeroDivisionError: no answers"):
        run_rl(tiny_config(*settings), tmp_path / "a")
    assert len(closed) == 1
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 1 and "no answers" in summary["error"]
    mended.touch()
    assert run_rl(tiny_config(*settings), tmp_path / "a", resume=True)["steps"] == 3
    assert [row["step"] for row in read_rows(tmp_path / "a")] == [1, 2, 3]


def test_a_run_that_has_diverged_is_not_finished(tiny_config, tmp_path, monkeypatch):
    real = Learner.finish

    def diverge(self):
        metrics = real(self)
        with torch.no_grad():
            next(self.engine.module.parameters()).fill_(math.nan)
        return metrics

    monkeypatch.setattr(Learner, "finish", diverge)
    config = tiny_config("steps=1", "eval.size=2", "sync.canary=false")
    with pytest.raises(DivergenceError, match="step 1: the weights of the learner are no longer finite, so this"):
        run_rl(config, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["status"] == "failed"
    assert not (tmp_path / "a" / "model").exists() and not list((tmp_path / "a" / "checkpoints").iterdir())


def test_a_canary_that_dies_is_an_alarm_and_the_run_goes_on(tiny_config, tmp_path, monkeypatch):
    real = HFGenerator.logprobs
    monkeypatch.setattr(HFGenerator, "logprobs", lambda self, rows: [[x - 1 for x in row] for row in real(self, rows)])
    summary = run_rl(tiny_config("steps=1", "eval.size=2"), tmp_path / "a")
    assert summary["status"] == "finished"
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert {(e["kind"], e["step"]) for e in events if e["event"] == "alarm"} == {("mismatch", 0), ("mismatch", 1)}
