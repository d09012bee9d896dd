"""DeepSpeed over real processes: every ZeRO stage on any number of ranks gives what one process gives.

Starting ranks is what takes time here, so each world size is started once and does all its jobs.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.errors import CheckpointError, WorkerError
from rlhf_ray.models.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.lora import apply_lora
from rlhf_ray.models.pretrained import exported_state
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.skeleton import Filled, skeleton
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.models.train_state import TrainState
from rlhf_ray.rewards.classifier import Classifier
from rlhf_ray.roles.reference import Reference

sys.path.insert(0, str(Path(__file__).parent))
from engine_cases import (
    EPS,
    SAVED,
    STAGES,
    TEXTS,
    WAVES_EPS,
    WORDS,
    answers_of,
    equal,
    frozen,
    held_in,
    rater,
    save_alone,
    snapshot,
    steps_of_roles,
    tiny,
    tiny_critic,
    tiny_lora,
    train,
    written_elsewhere,
)

pytestmark = pytest.mark.engine

DEADLINE_S = 800.0
COMPILED = "torch_extensions"
WORLDS = (1, 2, 3)
JOBS = {1: "parity,elastic", 2: "parity,variants,bad_gradient,waves,save,reading", 3: "parity,elastic"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(jobs: str, world_size: int, folder: Path) -> dict[str, list[dict[Any, Any]]]:
    """What each rank found in each job. One rank that fails, or the deadline, ends all of them."""
    port = free_port()
    script = Path(__file__).with_name("engine_cases.py")
    root = str(script.parents[2])
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "TORCH_EXTENSIONS_DIR": str(folder / COMPILED),
    }  # fmt: skip
    logs = [folder / f"{jobs}.{world_size}.{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(script), jobs, str(rank), str(world_size), str(port), str(folder)]
        with log.open("w") as output:
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    until = time.monotonic() + DEADLINE_S
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
            if failed or time.monotonic() > until:
                break
            time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * world_size, "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)
    return {
        job: [torch.load(folder / f"{job}.{world_size}.{rank}.pt", weights_only=False) for rank in range(world_size)]
        for job in jobs.split(",")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    save_alone(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    """found(world size)[job][rank]"""
    cache: dict[int, Any] = {}

    def of(world_size: int) -> dict[str, list[dict[Any, Any]]]:
        if world_size != 2:
            of(2)  # whose checkpoints the others go on from
        if world_size not in cache:
            cache[world_size] = run_ranks(JOBS[world_size], world_size, folder)
        return cache[world_size]

    return of


def reference(model: torch.nn.Module, **settings: Any) -> dict[str, Any]:
    engine = TorchEngine(model, eps=EPS, **settings)
    return {"history": train(engine, range(3)), "weights": snapshot(engine)}


def merged(checkpoint: Path, adapt: Callable[[Any], Any] = lambda module: module) -> dict[str, torch.Tensor]:
    """The weights that `rlhf-ray merge` writes."""
    state = TrainState(checkpoint)
    module = adapt(skeleton(state, "made/here", classifies=False))
    return {name: weight.clone() for name, weight in exported_state(module, "model", Filled(module, state))}


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses, gradient norms and every exported weight."""
    torch.testing.assert_close(
        torch.tensor(one["history"]), torch.tensor(other["history"]), atol=tolerance, rtol=tolerance
    )
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_stage_on_any_number_of_ranks_trains_like_one_process(found: Any, world_size: int) -> None:
    expected = reference(tiny())
    ranks = found(world_size)["parity"]
    for stage in STAGES:
        for rank in ranks:
            assert_same(rank[stage], expected)
            # Ranks must not drift apart, not even in the last bit.
            assert rank[stage]["history"] == ranks[0][stage]["history"]
            assert equal(rank[stage]["weights"], ranks[0][stage]["weights"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_over_ranks_says_what_one_process_says_and_each_holds_its_part(found: Any, dtype: Any) -> None:
    ranks = found(2)["reading"]
    alone = Reference(frozen(dtype), temperature=0.7, tokens_per_microbatch=24)
    for number, batch in enumerate(answers_of(7, 1)):
        expected, parts = alone.logprobs(batch), [rank[dtype][number] for rank in ranks]
        assert not (parts[0].bool() & parts[1].bool()).any(), "each row is one rank's"
        torch.testing.assert_close(sum(parts), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
        assert expected.count_nonzero() == batch.response_mask.sum()
    whole = sum(p.numel() * p.element_size() for p in frozen(dtype).parameters())
    assert [rank[dtype, "held"] for rank in ranks] == [whole / 2] * 2
    assert all("makes another network than rank 0 has loaded" in rank["error"] for rank in ranks)


def test_a_reward_model_over_ranks_scores_as_one_process_does(found: Any) -> None:
    """Three batches for two ranks, and one: each rank makes as many passes, and both know all scores."""
    alone = Classifier(rater(), WORDS, "x")
    for number, texts in enumerate((TEXTS, TEXTS[:1])):
        expected = alone.score(texts, 0, "logit", 5, 2)
        assert [rank["scores"][number] for rank in found(2)["reading"]] == [expected] * 2
    assert len(set(alone.score(TEXTS, 0, "logit", 5, 2).values)) == 3 and expected.cut == 0


def test_export_is_the_same_for_all_stages_and_writes_tied_weights_twice(found: Any) -> None:
    names = tiny().state_dict().keys()
    for stage in STAGES:
        weights = found(2)["parity"][0][stage]["weights"]
        assert weights.keys() == names
        assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert weights["lm_head.weight"].shape == (48, 32)


def test_nothing_is_compiled(found: Any, folder: Path) -> None:
    """A user's machine may have no compiler, and on a fresh one the first step would come a minute later."""
    assert found(2)["parity"] and found(2)["variants"]
    assert not (folder / COMPILED).exists()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["untied", "lora", "critic", "lstm"])
def test_other_models_train_like_one_process(found: Any, name: str, stage: int) -> None:
    models = {
        "untied": lambda: tiny(tied=False),
        "lora": tiny_lora,
        "critic": lambda: ValueModel(tiny().base_model),
        "lstm": lambda: build_scratch("lstm", vocab_size=48, hidden_size=32, layers=1),
    }
    expected = reference(models[name]())
    for rank in found(2)["variants"]:
        assert_same(rank[name, stage], expected)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["untied", "lora", "critic"])
def test_the_saved_folder_holds_the_exported_weights(found: Any, name: str, stage: int) -> None:
    run = found(2)["variants"][0][name, stage]
    factory = ValueModel if name == "critic" else AutoModelForCausalLM
    loaded = factory.from_pretrained(run["saved"])
    assert equal(dict(loaded.state_dict()), run["weights"])


@pytest.mark.parametrize("stage", [1, 3])
def test_the_adapter_alone_gives_the_exported_weights(found: Any, stage: int) -> None:
    from peft import PeftModel

    run = found(2)["variants"][0]["lora", stage]
    merged = PeftModel.from_pretrained(tiny(), run["saved"] / "adapter").merge_and_unload()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, run["weights"][name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("variant", [("checkpointing", 3), ("offload", 2), ("offload", 3)])
def test_memory_savers_do_not_change_the_numbers(found: Any, variant: tuple[str, int]) -> None:
    expected = reference(tiny())
    run = found(2)["variants"][0][variant]
    assert_same(run, expected)
    # Of 5, 7 and 9 rows in twos, rank 0 has 2 micro-batches of each step, and of the last 3; a look without
    # gradient precedes each step. Checkpointing computes the micro-batches twice.
    micro_batches = 2 + 2 + 3
    assert run["layer_calls"] == 3 + micro_batches * (2 if variant[0] == "checkpointing" else 1)


@pytest.mark.parametrize("variant", [*(("late", stage) for stage in STAGES), ("late offload", 2)])
def test_gradients_may_be_divided_when_all_are_there(found: Any, variant: tuple[str, int]) -> None:
    """By the tokens that nobody knew before; the norm and its clipping are those of the quotient."""
    expected = reference(tiny())
    assert expected["history"][0][1] > 1, "clipped"
    for rank in found(2)["variants"]:
        assert_same(rank[variant], expected)


def test_gradients_in_bfloat16_may_be_divided_when_all_are_there(found: Any) -> None:
    variants = found(2)["variants"][0]
    expected, run = variants["bfloat16", 1], variants["late bfloat16", 1]
    torch.testing.assert_close(torch.tensor(run["history"]), torch.tensor(expected["history"]), atol=1e-2, rtol=1e-2)
    for name, weight in run["weights"].items():  # a gradient that is mere rounding moves them 3e-3 in either direction
        torch.testing.assert_close(weight, expected["weights"][name], atol=7e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("stage", [2, 3])
def test_waves_on_two_ranks_are_one_step_of_one_process(found: Any, stage: int) -> None:
    engine, values = (TorchEngine(model, eps=WAVES_EPS) for model in (tiny(), tiny_critic()))
    expected = steps_of_roles(engine, values, [[0, 1, 2, 3, 4]])
    assert expected[0]["grad_norm"] > 0 and expected[0]["loss/value"] > 0
    for rank in found(2)["waves"]:
        for one, other in zip(rank[stage]["metrics"], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
        for name, trained in (("weights", engine), ("values", values)):
            for key, weight in snapshot(trained).items():
                torch.testing.assert_close(rank[stage][name][key], weight, atol=1e-6, rtol=0, msg=key)


def test_deepspeed_refuses_to_go_on_after_a_step_that_was_cut_off(found: Any) -> None:
    """It keeps what its ranks have averaged in places of its own."""
    assert all("an earlier step was cut off" in rank["cut off"] for rank in found(2)["waves"])


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_has_float32_masters_at_every_stage(found: Any, stage: int) -> None:
    expected = reference(tiny(), dtype=torch.bfloat16)
    run = found(2)["variants"][0]["bfloat16", stage]
    assert {weight.dtype for weight in run["weights"].values()} == {torch.bfloat16}
    # Ranks add up rounded gradients in another order: three digits is what bfloat16 has.
    torch.testing.assert_close(torch.tensor(run["history"]), torch.tensor(expected["history"]), atol=1e-2, rtol=1e-2)
    for name, weight in run["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], atol=5e-3, rtol=1e-2, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_stops_the_update_on_all(found: Any, stage: int) -> None:
    expected = train(TorchEngine(tiny(), eps=EPS), [0, 1])
    for rank in found(2)["bad_gradient"]:
        run = rank[stage]
        assert not math.isfinite(run["norm"])
        assert run["unchanged"]
        assert run["steps"] == 1
        torch.testing.assert_close(torch.tensor(run["next"]), torch.tensor(expected[1:]), atol=1e-5, rtol=1e-5)


def test_resume_in_fresh_processes_is_bit_equal_and_refuses_what_does_not_fit(found: Any, folder: Path) -> None:
    saved = found(2)["save"]
    resumed = run_ranks("resume", 2, folder)["resume"]
    for before, after in zip(saved, resumed, strict=True):
        for key in SAVED:
            assert before[key]["rewound"] and before[key]["named"], key
            assert after[key]["steps"] == 4, key
            assert after[key]["history"] == before[key]["history"], key
            assert equal(after[key]["weights"], before[key]["weights"]), key
        assert equal(after["lora"], before["lora"])
    nowhere, other_dtype, broken = zip(*(rank["errors"] for rank in resumed), strict=True)
    assert all("engine.json does not exist" in message for message in nowhere)
    assert all("dtype=torch.bfloat16, this run has dtype=torch.float32" in message for message in other_dtype)
    assert all("lacks rank_1.safetensors" in message for message in broken)


@pytest.mark.parametrize("world_size", [1, 3])
def test_checkpoints_of_any_stage_are_complete_at_any_other_on_any_number_of_ranks(
    found: Any, folder: Path, world_size: int
) -> None:
    sources = written_elsewhere(folder)
    assert len(held_in(folder / "torch.float32-3")) == 4 * len(list(tiny().parameters()))
    undisturbed = {f"{dtype}-{stage}": run["history"] for (dtype, stage), run in
                   ((key, run) for key, run in found(2)["save"][0].items() if key != "lora")}  # fmt: skip
    for rank in found(world_size)["elastic"]:
        for dtype, stage in SAVED:
            for source in [path for kind, path in sources if kind == dtype]:
                run = rank[dtype, stage, source.name]
                assert equal(held_in(run["again"]), held_in(source)), (stage, source)
                plain = TorchEngine(tiny(seed=7), dtype=dtype)
                plain.load(source)
                assert equal(snapshot(plain), run["weights"]), (stage, source)
                assert equal(merged(source), run["weights"]), (stage, source)
                expected = undisturbed.get(source.name, undisturbed[f"{dtype}-1"])
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(
                    torch.tensor(run["history"]), torch.tensor(expected), atol=tolerance, rtol=tolerance
                )
        assert equal(rank["lora"], found(2)["save"][0]["lora"])
        assert f"of {world_size}" in rank["rank"] and "already rank" in rank["rank"]


def test_what_lora_has_learned_is_merged_out_of_the_parts_of_both_ranks(found: Any, folder: Path) -> None:
    adapt = partial(apply_lora, r=4, seed=1)
    assert equal(merged(folder / "lora", adapt), found(2)["save"][0]["lora"])


def lonely(port: int) -> DeepSpeedEngine:
    return DeepSpeedEngine(tiny(), rank=0, world_size=2, master_address="127.0.0.1", master_port=port, timeout_s=1.0)


def test_a_missing_rank_is_an_error_within_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match="rank 0 of 2 could not meet the others"):
        lonely(free_port())
    assert time.monotonic() - started < 60, "60 times its limit"


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(WorkerError, match=f"127.0.0.1:{port}.*port is free"):
            lonely(port)


def test_a_problem_of_one_rank_is_raised_by_all_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that is asked has none itself; its error is as good to read as the other's."""
    engine = object.__new__(DeepSpeedEngine)
    engine.world_size = 3

    def gather(said: list[str | None], problem: str | None) -> None:
        said[:] = [problem, "lacks a file", None]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(CheckpointError, match="^rank 1: lacks a file$"):
        engine._agree(None)
