"""Whole runs on a real Ray: the same numbers as a local run, and nothing kept that is not needed."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

import rlhf_ray
from rlhf_ray.models.scratch import build_scratch_classifier
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.remote import dispatch
from rlhf_ray.remote.crew import Crew
from rlhf_ray.rollout import groups
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start.rl import run_rl

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200), pytest.mark.usefixtures("own_ray")]

PPO = (
    "algorithm.name=ppo", "algorithm.normalize_rewards=running", "learner.minibatches=2", "critic.minibatches=3",
    "learner.epochs=2",
)  # fmt: skip
# Rows of several rounds, of several temperatures, and some that nobody sampled.
DAPO = (
    "algorithm.name=dapo", "algorithm.resample_rounds=2", "rollout.reference_answers=1",
    "rollout.temperatures=[0.5,1.5]", "rewards.0.args.pattern='[0-4].*'",
)  # fmt: skip
SHARDED = (
    "learner.engine=deepspeed", "learner.world_size=3", "learner.zero_stage=2", "critic.engine=deepspeed",
    "critic.world_size=2", "critic.zero_stage=2",
)  # fmt: skip


# What a role has no use for: it costs each of its actors seconds and hundreds of MB.
OTHERS = {
    "reward": ("transformers.modeling_utils", "peft", "deepspeed", "vllm", "rlhf_ray.roles.learner"),
    "generator": ("peft", "deepspeed", "vllm", "rlhf_ray.roles.learner", "rlhf_ray.roles.reward", "rlhf_ray.rewards"),
    "critic": ("vllm", "rlhf_ray.roles.generator_hf", "rlhf_ray.roles.learner", "rlhf_ray.roles.reward"),
    "learner": ("vllm", "rlhf_ray.roles.generator_hf", "rlhf_ray.roles.reward"),
}


@pytest.fixture
def modules_of_actors(monkeypatch) -> dict[str, set[str]]:
    """Filled when all roles are built: the name of each worker -> what its process has imported."""
    found: dict[str, set[str]] = {}
    built = Crew.built

    def look(crew: Crew, *given) -> None:
        def imported(host) -> set[str]:
            import sys

            return set(sys.modules)

        for worker in crew.workers:
            found[worker.name] = ray.get(worker.actor.__ray_call__.remote(imported))
        built(crew, *given)

    monkeypatch.setattr(Crew, "built", look)
    return found


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def completions_of(folder: Path) -> list[list[dict]]:
    files = sorted((folder / "rollouts").glob("step_*.jsonl"), key=lambda f: int(f.stem.split("_")[1]))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def require_equal(one: Path, other: Path, tolerance: float) -> None:
    """The same sampled completions, and the same losses."""
    assert completions_of(one) == completions_of(other)
    assert len(metrics_of(one)) == 3
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        names = [name for name in a if name.startswith(("loss/", "reward/", "advantage/", "value/", "grad_norm", "kl"))]
        assert len(names) >= 5 and a["grad_norm"] > 0
        assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, abs=tolerance), a["step"]


def require_the_same_run(local: Path, remote: Path) -> None:
    require_equal(local, remote, tolerance=1e-5)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (local, remote))
    assert other["after"]["samples"] == one["after"]["samples"] and other["status"] == "finished"
    assert max(m["sync/canary_absdiff"] for m in metrics_of(remote)) < 1e-5


def test_ray_gives_the_numbers_of_a_local_run(tiny_config, tmp_path):
    run_rl(tiny_config("logging.rollouts=24", *DAPO), tmp_path / "local")
    run_rl(tiny_config("logging.rollouts=24", "executor=ray", *DAPO), tmp_path / "ray")
    require_the_same_run(tmp_path / "local", tmp_path / "ray")


def test_two_generators_and_a_resumed_run_give_the_same_numbers(tiny_config, tmp_path, monkeypatch):
    """What is sampled depends neither on where, nor on the number of generators, nor on a stop in between; and rewards
    not on whether they are computed in one call or, here, in three, while others are being written.

    Of two sources, drawn by weight.
    """
    monkeypatch.setattr(groups, "LEAST_ROWS", 8)
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(2, 9)))
    sources = f"data={{max_prompt_tokens: 8, eval_size: 2, sources: [{{path: 'task:arithmetic', weight: 2}}, " \
              f"{{path: {tmp_path}/more.jsonl, weight: 1}}]}}"  # fmt: skip
    # LoRA: the learner is its own reference, and is asked for both policies at once.
    options = ("logging.rollouts=24", "model.lora.r=2", "model.tokenizer.alphabet='0123456789+='", sources, *PPO)
    on_ray = ("executor=ray", "generator.count=2")
    run_rl(tiny_config(*options), tmp_path / "local")
    run_rl(tiny_config(*options, *on_ray, "steps=2"), tmp_path / "ray")
    run_rl(tiny_config(*options, *on_ray), tmp_path / "ray", resume=True)
    require_the_same_run(tmp_path / "local", tmp_path / "ray")
    for local, remote in zip(metrics_of(tmp_path / "local"), metrics_of(tmp_path / "ray"), strict=True):
        names = ("source/arithmetic/count", "source/more/count", "source/more/reward/mean", "source/more/epochs")
        assert [remote[name] for name in names] == [local[name] for name in names] and local[names[0]] == 16
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("local", "ray")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=0)


def test_ranks_of_learner_and_critic_give_the_numbers_of_one_process(tiny_config, tmp_path, modules_of_actors):
    """Three ranks and two, which share completions of every length; the many also compute a group's prompt once.

    Beside them two rows a step are learned: one of the three ranks has none.
    """
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "12+34=46" * n}) + "\n" for n in (1, 2, 3)))
    ptx = ("algorithm.sft_coef=0.5", f"sft_data.path={tmp_path}/rows.jsonl", "sft_data.max_length=32",
           "sft_data.batch_size=2")  # fmt: skip
    ppo = (
        "logging.rollouts=24", "algorithm.name=ppo", "learner.epochs=1", "learner.minibatches=2",
        "critic.epochs=1", "critic.minibatches=3",
        "algorithm.kl_coef=0",  # no reference: a worker less to start
        *ptx,
    )  # fmt: skip
    run_rl(tiny_config(*ppo), tmp_path / "one")
    run_rl(tiny_config(*ppo, "executor=ray", *SHARDED, "learner.share_prompts=true"), tmp_path / "many")
    require_equal(tmp_path / "one", tmp_path / "many", tolerance=1e-5)
    assert len({row["tokens"] for step in completions_of(tmp_path / "one") for row in step}) > 3, "ragged"
    for step in metrics_of(tmp_path / "many"):
        assert step["loss/value"] > 0 and step["critic/grad_norm"] > 0 and step["loss/sft"] > 1
    assert sum(step["sft/tokens"] for step in metrics_of(tmp_path / "many")) == 4 * (8 + 16 + 24), "four epochs"
    assert len(modules_of_actors) == 3 + 2 + 1 + 1
    for name, modules in modules_of_actors.items():
        foreign = modules.intersection(OTHERS[name.split()[0]])
        assert not foreign, f"{name} has imported {sorted(foreign)}"


def test_a_reference_and_a_reward_model_over_ranks_give_the_numbers_of_one_process(tiny_config, tmp_path, strikes):
    """One rank of the reference is killed while it computes: both are started again, and meet anew."""
    tokenizer = build_tokenizer("char", ["0123456789+="])
    shape = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64, "pad_token_id": tokenizer.pad_token_id}
    judge = build_scratch_classifier("qwen2", labels=["score"], vocab_size=len(tokenizer), **shape)
    for part in (judge, tokenizer):
        part.save_pretrained(tmp_path / "judge")
    # Texts of the reward model come in more batches than there are ranks, micro-batches of the reference too.
    options = ("logging.rollouts=24", "algorithm.kl_coef=0.1", "eval.size=2", f"reward_model.path={tmp_path}/judge",
               "reward_model.batch_size=8", "reward_model.weight=9")  # fmt: skip
    run_rl(tiny_config(*options), tmp_path / "one")
    struck = strikes({("reference rank 0", "logprobs"): (2, "reference rank 1")})
    run_rl(tiny_config(*options, "executor=ray", "reference.world_size=2", "reward.world_size=2"), tmp_path / "many")
    require_equal(tmp_path / "one", tmp_path / "many", tolerance=1e-5)
    events = [json.loads(line) for line in (tmp_path / "many" / "events.jsonl").read_text().splitlines()]
    assert struck and [e["worker"] for e in events if e["event"] == "worker_lost"] == ["reference rank 1"]
    (again,) = [event["reason"] for event in events if event["event"] == "worker_restarted"]
    assert again.startswith("the places are taken again by reference rank 0 (") and ", reference rank 1 (" in again
    assert metrics_of(tmp_path / "many")[-1]["kl_ref"] != 0 and metrics_of(tmp_path / "many")[0]["reward/reward_model"]


def test_overlapped_generation_keeps_its_bound_and_no_old_batch(tiny_config, tmp_path, monkeypatch):
    references = ray._private.worker.global_worker.core_worker.get_all_reference_counts
    log, counts = TrainingRun.log, []

    def counted(run: TrainingRun, *args) -> None:
        log(run, *args)
        gc.collect()
        counts.append(len(references()))

    monkeypatch.setattr(TrainingRun, "log", counted)
    monkeypatch.setattr(dispatch, "HANDOVERS", 1)  # what is written of a step is one object, whenever its groups end
    (tmp_path / "own.py").write_text(
        "def loss(logp_BT, old_BT, adv_BT, mask_BT): return -(logp_BT - old_BT).exp() * adv_BT, {'old': old_BT}\n"
    )
    own = f"algorithm.policy_loss={tmp_path}/own.py:loss"  # each worker finds it by itself
    overlap = ("rollout.max_staleness=1", "algorithm.correction=truncate", "algorithm.kl_coef=0.01", own)
    config = tiny_config("executor=ray", "steps=12", "checkpoint.every=6", "checkpoint.keep=3", *overlap)
    run_rl(config, tmp_path / "run")
    steps = metrics_of(tmp_path / "run")
    assert [m["staleness/max"] for m in steps] == [0, *[1] * 11] == [m["staleness/mean"] for m in steps]
    assert all(m["sync/canary_absdiff"] < 1e-5 and m["policy_loss/old"] < 0 for m in steps)
    # A step's batch and the next one's are there, and each worker's pulse: what is older is gone.
    assert max(counts[4:]) <= max(counts[1:4]) + 4, counts
    # Step 7 was ready when the checkpoint of step 6 was written.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_12")
    run_rl(config, tmp_path / "again", resume=True)
    assert completions_of(tmp_path / "again") == completions_of(tmp_path / "run")
    for name in ("grad_norm", "ledger/sampled", "ledger/open_tokens"):
        assert [m[name] for m in metrics_of(tmp_path / "again")] == [m[name] for m in steps]


def test_a_closure_and_rows_of_the_program_give_the_numbers_of_a_local_run(tiny_config, tmp_path):
    worth, runs = 3.0, []
    for executor in ("local", "ray"):
        runs.append(rlhf_ray.rl(
            tiny_config("steps=1", "eval.size=2", "data.eval_size=2", f"executor={executor}"),
            prompts=[{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(9)],
            rewards=lambda completions, answer: [worth * len(text) for text in completions],
            run_dir=tmp_path / executor,
        ))  # fmt: skip
    local, remote = (run.rollouts(1) for run in runs)
    assert local == remote and {row["reward"] % 3 for row in remote} == {0.0}
    assert remote[0]["rewards"].keys() == {"lambda"}
    assert runs[1].metrics[0]["grad_norm"] == pytest.approx(runs[0].metrics[0]["grad_norm"], abs=1e-6)
