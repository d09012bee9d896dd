"""How long each phase of a step takes in a layout: arithmetic where a device computes, bytes where it reads.

Operations: 2 a parameter and token in a forward pass, 6 in training (Kaplan et al. 2020, section 2.1), and attention's
4 x layers x width x context besides, halved because it looks back only. Decoding reads all weights at each step, and
the keys and values of every row (Pope et al. 2023, Efficiently Scaling Transformer Inference, section 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_ray.models.memory import kv_bytes_a_token
from rlhf_ray.models.size import Size
from rlhf_ray.run.cost import FORWARD, TRAIN, TRAIN_ADAPTERS
from rlhf_ray.scale.case import Case
from rlhf_ray.scale.layout import Layout
from rlhf_ray.scale.needs import kv_tokens

GRADIENT_BYTES = 4  # ranks add gradients up in float32
FUSED_STEP_BYTES = 36  # a parameter's gradient, moments and master are read, all but the gradient written


@dataclass(frozen=True)
class Phase:
    """Attributes:
    devices: that work in it.
    why: what its time is made of.
    """

    name: str
    seconds: float
    devices: int
    why: str


@dataclass(frozen=True)
class Times:
    phases: tuple[Phase, ...]
    step: float  # seconds
    overlapped: bool

    def of(self, name: str) -> float:
        return sum(phase.seconds for phase in self.phases if phase.name == name)


def times_of(case: Case, layout: Layout) -> Times:
    """Phases in the loop's order. Separate frozen roles and the critic compute side by side; generation overlaps with
    the rest where the run may be stale."""
    config = case.config
    writing = generate(case, layout)
    columns = []
    if layout.reference:
        columns.append(_forward(case, "ref_logp", case.policy.base, layout.devices_of("reference")))
    if layout.critic_ranks:
        columns.append(_forward(case, "values", case.critic.parameters, layout.critic_ranks))
    if config.uses_old_logprobs:
        columns.append(_forward(case, "old_logp", case.policy.parameters, layout.ranks))
    reward = [_reward(case, max(1, layout.devices_of("reward")))] if case.judges or case.rates.reward_s else []
    updates = [update(case, layout, "critic")] if layout.critic_ranks else []
    updates.append(update(case, layout, "learner"))
    sync = weight_sync(case, layout)
    together = [phase.seconds for phase in columns]
    rest = (sum if layout.colocated else max)(together) if together else 0.0
    rest += sum(phase.seconds for phase in (*reward, *updates, sync))
    overlapped = config.rollout.max_staleness > 0 and not layout.colocated
    step = max(writing.seconds, rest) if overlapped else writing.seconds + rest
    return Times((writing, *reward, *columns, *updates, sync), step, overlapped)


def generate(case: Case, layout: Layout) -> Phase:
    """Until the last answer is there. One decoding step writes a token of each row that a generator has open."""
    rates, device, config = case.rates, case.device, case.config
    width, tensor_parallel = case.dtype.itemsize, layout.tensor_parallel
    rows = math.ceil(case.rows / layout.generators)
    busy = min(layout.generators, case.rows) * tensor_parallel
    if rates.generate_tokens_per_s is not None:
        seconds = rows * case.answer_tokens / (rates.generate_tokens_per_s * tensor_parallel)
        return Phase("generate", seconds, busy, "measured tokens a second")
    context = case.prompt_tokens + case.answer_tokens / 2
    held = int(kv_tokens(case, layout) // (case.prompt_tokens + case.answer_tokens))
    at_once = max(1, min(rows, config.generator.rows, held))
    tokens = rows * case.answer_tokens
    # The longest answer is written token by token, whatever the others do.
    steps = max(config.rollout.max_new_tokens, math.ceil(tokens / at_once))
    read = device.bandwidth * rates.decode_bandwidth
    weights = steps * case.policy.base * width / tensor_parallel / read
    keys = tokens * context * kv_bytes_a_token(case.shape, width, tensor_parallel) / read
    each = rates.launch_ms if config.generator.enforce_eager else rates.graph_launch_ms
    if tensor_parallel > 1:
        each += 2 * rates.reduce_ms  # after attention, after the MLP
    waiting = steps * case.shape.layers * each / 1000
    power = device.peak(case.dtype) * rates.forward_mfu * tensor_parallel
    computing = tokens * _operations(case, case.policy.base, context) / power
    prompts = math.ceil(rows / config.rollout.group_size)  # a group's prompt is read once
    reading = prompts * case.prompt_tokens * _operations(case, case.policy.base, case.prompt_tokens / 2) / power
    decoding = max(weights + keys, computing)
    why = (
        f"{steps:,} decoding steps of {at_once} rows: weights {weights:.3g} s, keys and values {keys:.3g} s, "
        f"starting kernels {waiting:.3g} s; prompts {reading:.3g} s"
    )
    return Phase("generate", decoding + waiting + reading, busy, why)


def update(case: Case, layout: Layout, name: str) -> Phase:
    """All passes and optimiser steps of the learner or the critic."""
    settings = case.training(layout, name)
    size = case.policy if name == "learner" else case.critic
    ranks, phase = settings.world_size, "update" if name == "learner" else "critic_update"
    steps = settings.epochs * settings.minibatches
    # Ranks wait for the one with most rows.
    rows = math.ceil(case.rows / settings.minibatches / ranks) * steps
    tokens = rows * case.tokens / case.rows
    busy = min(ranks, math.ceil(case.rows / settings.minibatches))
    if case.rates.train_tokens_per_s is not None:
        seconds = tokens / case.rates.train_tokens_per_s
        return Phase(phase, seconds, busy, "measured tokens a second")
    computing = tokens * _training(case, size, settings.gradient_checkpointing)
    computing /= case.device.peak(case.dtype) * case.rates.train_mfu
    passes = steps * max(1, math.ceil(tokens / steps / settings.tokens_per_microbatch))
    talking = _communication(case, layout, size, ranks, settings.zero_stage, passes, steps)
    stepping = steps * _optimiser_seconds(case, size, ranks, settings.offload)
    # ZeRO-3 fetches the next layer while this one computes; the others reduce when a pass has ended.
    work = max(computing, talking) if settings.zero_stage == 3 else computing + talking
    why = f"computing {computing:.3g} s, talking {talking:.3g} s, {steps} optimiser steps {stepping:.3g} s"
    return Phase(phase, work + stepping, busy, why)


def weight_sync(case: Case, layout: Layout) -> Phase:
    """The learner's weights, whole, to each generator."""
    sent = case.policy.base * case.dtype.itemsize
    collective = _collective(case, layout.devices)
    gathered = sent / collective if layout.zero_stage == 3 and layout.ranks > 1 else 0.0
    # Colocated, they are copied inside a device's memory; else broadcast, each device passing on what it receives.
    across = sent / case.device.bandwidth if layout.colocated else sent / collective
    return Phase("weight_sync", gathered + across, layout.devices, f"{sent / 1e9:.3g} GB to each generator")


def _forward(case: Case, name: str, parameters: int, devices: int) -> Phase:
    rows = math.ceil(case.rows / devices)
    operations = rows * case.tokens / case.rows * _operations(case, parameters, case.tokens / case.rows / 2)
    seconds = operations / (case.device.peak(case.dtype) * case.rates.forward_mfu)
    return Phase(name, seconds, min(devices, case.rows), "a forward pass")


def _reward(case: Case, replicas: int) -> Phase:
    operations = case.tokens * FORWARD * case.judges / replicas
    seconds = operations / (case.device.peak(case.dtype) * case.rates.forward_mfu) + case.rates.reward_s
    return Phase("reward", seconds, replicas, "networks that judge, and functions")


def _operations(case: Case, parameters: int, context: float) -> float:
    """Of one token in a forward pass. `context`: tokens that it attends to, on average."""
    return FORWARD * parameters + 4 * case.shape.layers * case.shape.queries * context


def _training(case: Case, size: Size, checkpointing: bool) -> float:
    """Of one token, forward and backward, and forward again with checkpointing."""
    factor = TRAIN if size.trained == size.parameters else TRAIN_ADAPTERS
    attention = 4 * case.shape.layers * case.shape.queries * case.tokens / case.rows / 2
    again = FORWARD * size.parameters + attention if checkpointing else 0.0
    return factor * size.parameters + 3 * attention + again


def _communication(
    case: Case, layout: Layout, size: Size, ranks: int, stage: int, passes: int, steps: int
) -> float:  # fmt: skip
    """Seconds that a rank sends. An all-reduce sends each number twice, half of it once (Rajbhandari et al. 2020,
    section 7)."""
    if ranks == 1:
        return 0.0
    weights, gradients = size.parameters * case.dtype.itemsize, size.trained * GRADIENT_BYTES
    if stage <= 1:
        sent = steps * (2 * gradients + (weights if stage == 1 else 0))
    elif stage == 2:  # reduced behind every micro-batch (deepspeed_engine.py)
        sent = passes * gradients + steps * weights
    else:
        sent = passes * (2 * weights + gradients)
    return sent * (ranks - 1) / ranks / _collective(case, ranks)


def _collective(case: Case, devices: int) -> float:
    """Bytes a second that a device sends in a collective over so many: inside a machine, or over the network."""
    within = devices <= case.device.in_a_node
    return (case.device.link if within else case.rates.network_gb_s * 1e9) * case.rates.link_share


def _optimiser_seconds(case: Case, size: Size, ranks: int, offload: str) -> float:
    own = size.trained / ranks
    if offload == "none":
        return own * FUSED_STEP_BYTES / case.device.bandwidth
    moved = own * (GRADIENT_BYTES + case.dtype.itemsize)
    return moved / (case.rates.host_gb_s * 1e9) + own / case.rates.host_adam
