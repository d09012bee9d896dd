"""Workers that take turns on one GPU (ray.colocate): who loads when, and who gives memory back. Nothing real starts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from rlhf_ray.models.devices import Hardware
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.remote.health import State
from rlhf_ray.remote.host import Place
from rlhf_ray.remote.loading import silent
from rlhf_ray.remote.placement import Placement, plan_seats
from rlhf_ray.remote.roles import _build, _handles, _rank_steps
from rlhf_ray.roles import generator_vllm
from rlhf_ray.roles.factory import Assets
from rlhf_ray.roles.makers import Makers

ON_GPU = Assets("nowhere", "nowhere", Hardware("cuda", torch.bfloat16))
PPO = ("executor=ray", "generator.engine=vllm", "algorithm.name=ppo", "reward_model.path=judge")


class Recorded:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def start(self, method: Callable[..., Any], *args: Any, deadline: Any) -> str:
        self.log.append(f"{self.name}: {method.__name__}")
        return self.name

    ask = start


class FakeCrew:
    """`log`: every call that was started, and "--" where all of them were waited for."""

    def __init__(self, plan: Placement) -> None:
        self.log: list[str] = []
        self.workers = [Recorded(seat.name, self.log) for seat in plan.seats]

    def named(self, role: str) -> list[Recorded]:
        return [worker for worker in self.workers if worker.name.split()[0] == role]

    def locate(self, deadline: Any) -> dict[str, Place]:
        return {worker.name: Place("here", 1, 2, ("0",)) for worker in self.workers}

    def state(self, worker: Recorded) -> State:
        return State.HEALTHY

    def results(self, calls: list[str], done: Callable[[Any], None] = lambda call: None) -> list[None]:
        if calls:
            self.log.append("--")
        return [None] * len(calls)


@pytest.fixture
def crew_of(tiny_config, monkeypatch) -> Callable[..., tuple[FakeCrew, Placement, Any]]:
    monkeypatch.setattr(ray, "put", lambda value: value)  # the real one would start a Ray, and leave it there

    def make(*overrides: str) -> tuple[FakeCrew, Placement, Any]:
        config = tiny_config(*PPO, *overrides)
        plan = plan_seats(config, "cuda", "cuda_ipc" if config.ray.colocate else "nccl")
        return FakeCrew(plan), plan, config

    return make


def test_the_generator_loads_alone_and_sleeps_while_the_others_load(crew_of):
    crew, plan, config = crew_of("ray.colocate=true")
    makers = Makers.of(config, ON_GPU, "cuda_ipc")
    _build(crew, plan, makers, {}, config.ray, _rank_steps(crew, makers, None, config), silent)
    start = crew.log.index("generator 0: build")
    assert crew.log[start : start + 4] == ["generator 0: build", "--", "generator 0: sleep", "--"]
    rest = crew.log[start + 4 :]
    assert rest.index("--") == 4 and all(line.endswith(": build") for line in rest[:4])


def test_on_gpus_of_their_own_all_load_together(crew_of):
    crew, plan, config = crew_of()
    makers = Makers.of(config, ON_GPU, "nccl")
    _build(crew, plan, makers, {}, config.ray, _rank_steps(crew, makers, None, config), silent)
    assert [line.endswith(": build") for line in crew.log[:6]] == [True] * 5 + [False]
    assert "generator 0: sleep" not in crew.log


def test_the_others_give_their_cached_memory_back_before_the_generator_wakes(crew_of):
    crew, plan, config = crew_of("ray.colocate=true")
    _handles(crew, plan, config).generator.wake()
    others = ["learner rank 0", "critic rank 0", "reference", "reward"]
    assert crew.log == [*(f"{name}: release_memory" for name in others), "--", "generator 0: wake", "--"]
    crew, plan, config = crew_of()
    _handles(crew, plan, config).generator.wake()
    assert crew.log == ["generator 0: wake", "--"]


@pytest.mark.parametrize(("overrides", "share", "sleeps"), [
    ([], 0.8, False), (["ray.colocate=true"], 0.4, True),
    (["ray.colocate=true", "generator.gpu_memory_utilization=0.6"], 0.6, True),
])  # fmt: skip
def test_what_vllm_is_told(tiny_config, tmp_path, monkeypatch, overrides, share, sleeps):
    build_scratch("gpt2", vocab_size=8, hidden_size=8, layers=1, heads=2, max_length=64).save_pretrained(tmp_path)
    monkeypatch.setattr(generator_vllm, "VLLMGenerator", lambda model, **settings: SimpleNamespace(**settings))
    saved = ("model.path=nobody/nothing", "model.tokenizer.path=null", "data.max_prompt_tokens=1024")
    config = tiny_config(*PPO, *saved, "generator.engine_args.max_num_seqs=512", *overrides)
    made = Makers.of(config, Assets(str(tmp_path), "nowhere", ON_GPU.hardware), "cuda_ipc").generator()
    assert made.max_model_len == 64, "no more than the model has positions for; the prompts have been checked"
    assert (made.gpu_memory_utilization, made.sleep_mode) == (share, sleeps)
    assert made.engine_args == {"max_num_seqs": 512}
