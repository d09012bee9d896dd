"""Which answers make up a group and which groups are learned from: settings that contradict each other."""

from __future__ import annotations

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import LearnerConfig, RolloutConfig


def group_problems(algorithm: AlgorithmConfig, rollout: RolloutConfig) -> list[str]:
    """Each with what, why and what to do."""
    problems = []
    baseline = algorithm.advantage_facts.baseline
    if baseline == "group" and rollout.group_size < 2:
        problems.append(
            f"{algorithm.name}: rollout.group_size={rollout.group_size} makes every advantage 0, "
            "for an answer is compared with the others of its group; set rollout.group_size >= 2"
        )
    if algorithm.resample_rounds and baseline not in ("group", "own"):
        problems.append(
            f"algorithm.resample_rounds={algorithm.resample_rounds} replaces groups with equal rewards, and "
            f"algorithm.advantage={algorithm.advantage} learns from these too; set algorithm.resample_rounds=0"
        )
    if rollout.reference_answers >= rollout.group_size:
        problems.append(
            f"rollout.reference_answers={rollout.reference_answers} leaves none of the rollout.group_size="
            f"{rollout.group_size} members for the policy to write; raise group_size or lower reference_answers"
        )
    sampled = rollout.group_size - rollout.reference_answers
    if len(rollout.temperatures) > max(1, sampled):
        problems.append(
            f"rollout.temperatures has {len(rollout.temperatures)} entries for {sampled} sampled members of a group, "
            "so some would never be used; shorten it or raise rollout.group_size"
        )
    if rollout.temperature_end is not None and rollout.temperatures:
        problems.append(
            "rollout.temperature_end moves rollout.temperature, and rollout.temperatures gives each member of a group "
            "its own; set one of the two"
        )
    return problems


def shaping_problems(algorithm: AlgorithmConfig, learner: LearnerConfig, group_size: int) -> list[str]:
    """Rewards, baselines and the KL controller."""
    problems = []
    if algorithm.kl_controller != "fixed" and algorithm.kl_coef_end is not None:
        problems.append(
            f"algorithm.kl_controller={algorithm.kl_controller} decides the coefficient from the KL it sees, and "
            "algorithm.kl_coef_end by the step; remove kl_coef_end, or set kl_controller=fixed"
        )
    if learner.stop_kl is not None and learner.epochs * learner.minibatches == 1:
        problems.append(
            f"learner.stop_kl={learner.stop_kl} ends a step's further passes, and there is only one optimiser "
            "step; set learner.epochs or learner.minibatches above 1, or leave stop_kl empty"
        )
    if algorithm.kl_controller != "fixed" and algorithm.kl_coef == 0:
        problems.append(
            f"algorithm.kl_controller={algorithm.kl_controller} multiplies algorithm.kl_coef, which is 0 and would "
            "stay 0; set a positive kl_coef"
        )
    if (algorithm.kl_controller == "scheduled") != (algorithm.kl_target_end is not None):
        problems.append(
            "algorithm.kl_controller=scheduled moves the target from kl_target to kl_target_end, and only one of "
            "kl_controller=scheduled and kl_target_end is set; set both or neither"
        )
    if algorithm.moving_baseline and not algorithm.advantage_facts.may_move:
        problems.append(
            f"algorithm.moving_baseline belongs to advantage=reinforce, and {algorithm.advantage} has a baseline of "
            "its own; set algorithm.moving_baseline=false"
        )
    if algorithm.normalize_rewards == "group" and group_size < 2:
        problems.append(
            "algorithm.normalize_rewards=group compares an answer with the others of its group, and with "
            f"rollout.group_size={group_size} every reward would be 0; set normalize_rewards=running"
        )
    if algorithm.normalize_rewards == "group" and algorithm.advantage_facts.baseline == "greedy":
        problems.append(
            "algorithm.normalize_rewards=group rescales each group, to which ReMax's greedy answer does not belong, so "
            "its reward would no longer be comparable; set normalize_rewards=running"
        )
    return problems
