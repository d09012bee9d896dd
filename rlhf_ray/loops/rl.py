"""The reinforcement-learning loop: local and on Ray, synchronous and overlapped, for every algorithm.

    prompts -> generator.generate -> reward.score -> reference.logprobs, critic.values, learner.logprobs
            -> advantages -> critic and learner: begin, learn, finish -> weight sync -> log

`roles` are either the role objects themselves or typed handles to Ray actors; a batch is opaque here.
After `step` updates the policy has weight version `step`; step k learns from what version k (or, overlapped,
one of the n before it) has written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf_ray.algo.kl import AdaptiveKL, FixedKL, KLController, ScheduledKL
from rlhf_ray.algo.schedules import linear
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.loops.evaluate import Evaluator, numbers_of
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.protocols import Roles
from rlhf_ray.rollout.source import Rollouts
from rlhf_ray.run.background import Background
from rlhf_ray.run.bad_steps import BadSteps
from rlhf_ray.run.training_run import TrainingRun
from rlhf_ray.sync.canary import Canary


def train(
    config: RunConfig, roles: Roles, rollouts: Rollouts, evaluator: Evaluator, canary: Canary | None, run: TrainingRun
) -> dict[str, Any]:
    """Run `config.steps` steps from where `run` stands; the evaluation before and after, and their samples.

    Raises RanksLostError where ranks that learn are lost: `loops/rewind.py` calls it again, from the newest checkpoint.
    """
    start, kl = restore(new_controller(config.algorithm, config.steps * config.samples_per_step), roles, rollouts, run)
    push_weights(start, roles, rollouts, canary, run)
    before = run.remember("before", lambda: evaluator.evaluate(start))
    run.begin()
    bad_steps = BadSteps(run, roles.store)
    for step in run.steps(start):
        with run.timer("step"):
            scored = rollouts.next(step)
            kl_coef = linear(kl.coef, config.algorithm.kl_coef_end, step, config.steps)
            batch = add_columns(scored.batch, roles, config.uses_old_logprobs, run)
            with run.timer("advantages"):
                estimate = roles.advantages.estimate(batch, kl_coef)
                batch = batch.replace(**estimate.columns)
            metrics = {**scored.metrics, **estimate.stats, "kl_coef": kl_coef}
            kept_if_bad = bad_steps.watch(step + 1, batch, scored.scores, kl_coef, metrics)
            if roles.critic is not None:
                with kept_if_bad, run.timer("critic_update"):
                    roles.critic.begin(step)
                    roles.critic.learn(batch)
                    metrics |= roles.critic.finish()
            if roles.critic is None or step >= config.critic.warmup_steps:
                with kept_if_bad, run.timer("update"):
                    roles.learner.begin(step, kl_coef)
                    roles.learner.learn(batch)
                    metrics |= roles.learner.finish()
            # Also while only the critic learns: what is written next must not count as older than it is.
            metrics |= push_weights(step + 1, roles, rollouts, canary, run)
            # While only the critic learns nothing measures the KL, and a moving target moves on.
            kl = kl.update(metrics.get("kl_ref", math.nan), config.samples_per_step)
            if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < config.steps:
                with run.timer("eval"):
                    metrics |= numbers_of(evaluator.evaluate(step + 1), "eval/")
        run.log(step + 1, metrics, scored.batch.rows, scored.scores, scored.sources)
        # After the log, in the next step's time: a kill between the two repeats a row; the other way round it is lost.
        if run.is_checkpoint_due(step + 1):
            with kept_if_bad:
                save(step + 1, kl, roles, rollouts, run)
    return {"before": before, "after": evaluator.evaluate(max(start, config.steps))}


def add_columns(batch: Batch, roles: Roles, old_logprobs: bool, run: TrainingRun) -> Batch:
    """What the frozen policy, the critic and (`old_logprobs`) the learner say of each token; at once where they can."""
    calls: dict[str, tuple[str, Callable[[Batch], Any]]] = {}
    if roles.reference is not None:
        calls["logp_ref"] = ("ref_logp", roles.reference.logprobs)
    if roles.critic is not None:
        calls["values"] = ("values", roles.critic.values)
    if old_logprobs:
        calls["logp_old"] = ("old_logp", roles.learner.logprobs)

    def timed(name: str, call: Callable[[Batch], Any]) -> Any:
        with run.timer(name):
            return call(batch)

    if not (roles.parallel and len(calls) > 1):
        return batch.replace(**{column: timed(*call) for column, call in calls.items()})
    with Background(len(calls), "columns") as threads:
        waiting = {column: threads.submit(timed, *call) for column, call in calls.items()}
        return batch.replace(**{column: future.result() for column, future in waiting.items()})


def push_weights(
    version: int, roles: Roles, rollouts: Rollouts, canary: Canary | None, run: TrainingRun
) -> dict[str, float]:
    """Weight sync, then the proof that it worked: the canary compares both sides' log-probabilities."""
    rollouts.finish_writing()
    with run.timer("weight_sync"):
        roles.generator.wake()  # a colocated one sleeps between its turns
        metrics = roles.learner.push_weights(version)
        if canary is not None:
            verdicts = canary.check(roles.replicas, roles.learner.canary_logprobs(canary.tokens), version)
            metrics["sync/canary_absdiff"] = max(verdict.absdiff_max for verdict in verdicts)
            for verdict in verdicts:
                if not verdict.ok:
                    run.alarm("mismatch", verdict.reason, step=version)
        roles.generator.sleep()
    return metrics | rollouts.weights_changed(version)


def new_controller(algorithm: AlgorithmConfig, span: int) -> KLController:
    """`span`: samples of the whole run."""
    if algorithm.kl_controller == "adaptive":
        return AdaptiveKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
    if algorithm.kl_controller == "scheduled":
        return ScheduledKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_target_end, span, algorithm.kl_horizon)
    return FixedKL(algorithm.kl_coef)


def save(step: int, kl: KLController, roles: Roles, rollouts: Rollouts, run: TrainingRun) -> None:
    """A complete checkpoint: nothing else is needed to go on bit for bit."""
    with run.timer("ckpt"):
        writers = {"learner": roles.learner} | ({} if roles.critic is None else {"critic": roles.critic})
        state = {"kl": kl, "advantages": roles.advantages, "rollouts": rollouts}
        run.save(step, writers, {name: part.state_dict() for name, part in state.items()})


def restore(kl: KLController, roles: Roles, rollouts: Rollouts, run: TrainingRun) -> tuple[int, KLController]:
    """(the step to go on from, 0 for a new run; `kl` as it was there). Everything random is a function of the seed, the
    step, and the place in the prompt stream."""
    found = run.resume_point
    if found is None:
        return 0, kl
    roles.learner.load(found.folder / "learner")
    if roles.critic is not None:
        roles.critic.load(found.folder / "critic")
    roles.advantages.load_state_dict(found.state["advantages"])
    rollouts.load_state_dict(found.state["rollouts"])
    if not isinstance(kl, FixedKL):  # a fixed coefficient is whatever the config says today
        moving = {"coef", "elapsed"} & found.state["kl"].keys() & kl.state_dict().keys()
        kl = replace(kl, **{name: found.state["kl"][name] for name in moving})
    return found.step, kl
