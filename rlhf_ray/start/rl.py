"""An RL run from its config to its summary: inputs, policy, roles, loop, export."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_ray.clock import Clock
from rlhf_ray.config.load import on_device, validated
from rlhf_ray.config.rewards import right_by
from rlhf_ray.config.schema import RolloutConfig, RunConfig, SyncConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.stream import described
from rlhf_ray.data.token_rows import Bounds
from rlhf_ray.data.turn_end import with_turn_ends
from rlhf_ray.loops.best import BestPolicy, measure_of
from rlhf_ray.loops.evaluate import Evaluator
from rlhf_ray.loops.export import export
from rlhf_ray.loops.rewind import through_losses
from rlhf_ray.loops.rl import train
from rlhf_ray.models.devices import Hardware
from rlhf_ray.models.flops import peak_flops
from rlhf_ray.models.loading import stop_token_ids
from rlhf_ray.models.size import Size, saved_size
from rlhf_ray.roles.factory import Assets
from rlhf_ray.roles.protocols import Roles, Sampling
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.cost import Workload, passes_a_step
from rlhf_ray.run.directory import RunDirectory, kept_only_if_used
from rlhf_ray.run.observer import find_observer
from rlhf_ray.run.resume import frozen_clock
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.start.hardware import hardware_of, own_hardware
from rlhf_ray.start.rl_inputs import check_inputs, left_out, sources_of
from rlhf_ray.start.roles import open_roles
from rlhf_ray.start.warm_start import starting_policy
from rlhf_ray.sync.canary import DEFAULT_BOUND, Canary, canary_tokens


def run_rl(
    config: RunConfig, run_dir: str | Path | None = None, *, resume: bool = False, observers: Iterable[Any] = (),
    clock: Clock = time.monotonic,
) -> dict[str, Any]:  # fmt: skip
    """A whole run: warm start, training, evaluation, export. Returns what summary.json holds.

    Args:
        observers: who is told of each step beside those of `config.logging`: functions f(StepRecord), or Observers.
        clock: what the run's time is measured with.
    Raises:
        RlhfRayError: whatever went wrong, saying what to do. The run directory keeps everything up to there.
    """
    config = validated(config)
    hardware = hardware_of(config)
    config = on_device(config, hardware.device)
    told = [find_observer(given) for given in (*config.logging.observers, *observers)]
    directory = RunDirectory.open(config.name, run_dir, resume=resume)
    with kept_only_if_used(directory):
        config = frozen_clock(config, directory)
        tokenizer, train_prompts, held_out, sft = check_inputs(config, directory.start, hardware.device)
    read = sources_of(config.eval, train_prompts, held_out, tokenizer) | (sft.fingerprints if sft else {})
    run = TrainingRun(config, directory, read, observers=[make() for make in told], clock=clock)
    try:
        run.note(
            f"device: {hardware}; generator: {config.generator.engine}; learner: {config.learner.engine}"
        )
        if len(train_prompts.parts) > 1:
            run.note(described(train_prompts.parts))
        for line in [*left_out(train_prompts, held_out), *(sft.notes if sft else [])]:
            run.note(line)
        if len(held_out) < config.eval.size:
            run.note(f"held out: {len(held_out)} prompts; there are no more, and eval.size={config.eval.size}")
        policy, tokenizer_path = starting_policy(
            config, directory.start, own_hardware(hardware), on_step=run.warm_start_progress(),
            note=run.note,
        )
        assets = Assets(policy, tokenizer_path, hardware, config.model.trust_remote_code)
        named = stop_token_ids(policy, tokenizer, trust_remote_code=config.model.trust_remote_code)
        stop = with_turn_ends(named, tokenizer)
        with open_roles(config, assets, sft.rows if sft else None, run.note, run.fault) as roles:
            run.workload = workload_of(config, assets, roles)
            evaluator = Evaluator(
                roles.generator, roles.reward, held_out, sampling_of(config.rollout, stop, config.eval.temperature),
                seed=config.seed, right=right_by(config.rewards), best=_best(config, roles, directory),
            )  # fmt: skip
            rollouts = _rollouts(config, roles, train_prompts, sampling_of(config.rollout, stop), run)
            try:
                longest = Bounds.of(train_prompts.token_ids).longest + config.rollout.max_new_tokens
                canary = _canary(config.sync, tokenizer, longest, hardware, config.seed)
                result = _learned(config, roles, rollouts, evaluator, canary, run)
            finally:
                rollouts.close()
        run.finish("finished", **result)
    except BaseException as error:
        run.fail(error)
        raise
    return directory.read_summary()


def _learned(
    config: RunConfig, roles: Roles, rollouts: Rollouts, evaluator: Evaluator, canary: Canary | None, run: TrainingRun
) -> dict[str, Any]:
    """The steps, and the model at their end; where ranks that learn are lost, again from the newest checkpoint."""
    unlearned = roles.advantages.state_dict()

    def attempt() -> dict[str, Any]:
        roles.advantages.load_state_dict(unlearned)
        result = train(config, roles, rollouts, evaluator, canary, run)
        export(roles.learner, run.directory.model, run.directory.adapter if config.model.lora else None)
        return result

    result = through_losses(attempt, run, roles.rejoin, rollouts.go_back)
    return result if evaluator.best is None else {**result, "best": evaluator.best.found}


def _best(config: RunConfig, roles: Roles, directory: RunDirectory) -> BestPolicy | None:
    if config.eval.best_by is None:
        return None
    measure = measure_of(config.eval, config.judging, config.rollout.max_new_tokens)
    return BestPolicy(
        config.eval.best_by, roles.learner, directory, measure=measure, lora=config.model.lora is not None
    )


def workload_of(config: RunConfig, assets: Assets, roles: Roles) -> Workload:
    """What the steps compute with, for `perf/mfu` and `cost/device_hours`."""
    policy = saved_size(assets.policy, "policy", config.model.lora)
    critic = policy and Size(policy.base, policy.base)  # LoRA is the policy's alone
    if config.critic.path is not None:
        critic = saved_size(config.critic.path)
    peak = None if roles.device_name is None else peak_flops(roles.device_name, assets.hardware.dtype)
    return Workload(policy, critic, roles.devices, peak, passes_a_step(config))


def sampling_of(rollout: RolloutConfig, stop: tuple[int, ...], temperature: float | None = None) -> Sampling:
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature if temperature is None else temperature,
        top_p=rollout.top_p if temperature is None else 1.0,
        top_k=rollout.top_k if temperature is None else 0,
        stop_token_ids=stop,
    )


def _rollouts(config: RunConfig, roles: Roles, prompts: PromptSet, sampling: Sampling, run: TrainingRun) -> Rollouts:
    return Rollouts(
        roles.generator, roles.reward, prompts, config.rollout, sampling, algorithm=config.algorithm,
        steps=config.steps, seed=config.seed, timer=run.timer, texts=max(3, config.logging.rollouts),
        gather=roles.gather, store=roles.store, early_rewards=roles.early_rewards,
        judges=roles.judges,
    )  # fmt: skip


def _canary(sync: SyncConfig, tokenizer: Any, longest: int, hardware: Hardware, seed: int) -> Canary | None:
    """`longest`: tokens of the longest prompt and answer together."""
    if not sync.canary:
        return None
    bound = sync.canary_bound or DEFAULT_BOUND[str(hardware.dtype).removeprefix("torch.")]
    # No longer than what the run itself writes, and no tokens that were added later: that fits the model.
    return Canary(canary_tokens(tokenizer.vocab_size, length=max(2, min(16, longest - 1)), seed=seed), bound)
