"""Engines by name: where each is made, and what the rest of the house must know of it.

An engine that a user names by `module:function` or `file.py:function` has the facts that a field has by default.
Nothing is imported here before an engine is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import AfterValidator

from rlhf_ray.config.names import known_or_own


@dataclass(frozen=True)
class EngineFacts:
    """Attributes:
    maker: place of the function that makes it.
    package: optional package that it needs, also the name of the extra that installs it.
    on_mac: it runs on macOS and on MPS.
    """

    maker: str = ""
    package: str | None = None
    on_mac: bool = True


@dataclass(frozen=True)
class GeneratorEngine(EngineFacts):
    """Its maker is called as make(settings, assets, use) and returns a `roles.protocols.Generator`.

    `settings` is the section `generator`; roles/factory.py has the other two, `Assets` and `GeneratorUse`.

    Attributes:
        receives_on_gpu: weights may reach it by nccl and cuda_ipc, not by shared memory alone.
        tensor_parallel: several GPUs may share one model.
        serves_lstm: it can run scratch:lstm.
        limits_shapes: it has kernels for some shapes of models only, and arguments of its own (vllm_limits.py).
        highest_temperature: it samples at no higher one.
        rows: answers that it writes side by side, where generator.batch_size does not say it.
        slow_start: it takes so long to load that people want to be told.
        spare_tokens: tokens that it samples beyond those that it is asked about.
    """

    receives_on_gpu: bool = False
    tensor_parallel: bool = False
    serves_lstm: bool = True
    limits_shapes: bool = False
    highest_temperature: float | None = None
    rows: int | None = None
    slow_start: bool = False
    spare_tokens: int = 0


@dataclass(frozen=True)
class TrainingEngine(EngineFacts):
    """Its maker is called as make(model, **settings) and returns a `models.engine.TrainEngine`.

    Attributes:
        shards: several processes may train one model, and it takes ZeRO's settings and a rank.
    """

    shards: bool = False


GENERATORS = {
    "hf": GeneratorEngine("rlhf_ray.roles.factory:make_hf_generator"),
    "vllm": GeneratorEngine(
        "rlhf_ray.roles.factory:make_vllm_generator", package="vllm", on_mac=False, receives_on_gpu=True,
        tensor_parallel=True, serves_lstm=False, limits_shapes=True, highest_temperature=2.0, rows=256,
        slow_start=True, spare_tokens=1,
    ),
}  # fmt: skip
TRAINERS = {
    "torch": TrainingEngine("rlhf_ray.models.torch_engine:TorchEngine"),
    "deepspeed": TrainingEngine(
        "rlhf_ray.models.deepspeed_engine:DeepSpeedEngine", package="deepspeed", on_mac=False, shards=True
    ),
}
AUTO = "auto"
# What `auto` stands for is known when the device is; it contradicts nothing before, and where nobody asks it is hf.
_UNDECIDED = replace(GENERATORS["hf"], receives_on_gpu=True)


def generator_facts(engine: str) -> GeneratorEngine:
    return _UNDECIDED if engine == AUTO else GENERATORS.get(engine, GeneratorEngine(engine))


def trainer_facts(engine: str) -> TrainingEngine:
    return TRAINERS.get(engine, TrainingEngine(engine))


GeneratorName = Annotated[str, AfterValidator(lambda engine: known_or_own(engine, (AUTO, *GENERATORS)))]
TrainerName = Annotated[str, AfterValidator(lambda engine: known_or_own(engine, TRAINERS))]
