"""Every setting of `rlhf-ray pairs`: preference pairs from a model's own answers, labelled by a judge or a reward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.evaluation import SampledModel, SampledRunConfig, SamplingConfig
from rlhf_ray.config.sections import RunName


class PairSamplingConfig(SamplingConfig):
    """How the answers that are compared are drawn."""

    samples_per_prompt: int = Field(2, gt=1, description="answers to each prompt")


class PairsConfig(SampledRunConfig):
    """`model` answers each prompt several times; its answers are compared, and who wins is `chosen`."""

    name: RunName = "pairs"
    model: SampledModel
    sampling: PairSamplingConfig = PairSamplingConfig()
    label_by: Literal["auto", "judge", "reward"] = Field(
        "auto", description="reward: the weighted sum of rewards and reward_model; auto: judge where there is one"
    )
    pairing: Literal["all", "disjoint", "best_worst"] = Field(
        "all", description="which answers to a prompt are compared: each with each; 1 with 2, 3 with 4, ...; by reward"
    )
    min_margin: float = Field(0.0, ge=0, description="reward: scores that differ by no more than this are a tie")
    human_pairs: int = Field(
        200, ge=0, description="data with chosen and rejected: measure agreement on so many of its pairs"
    )

    @property
    def labelled_by_judge(self) -> bool:
        return self.label_by == "judge" or (self.label_by == "auto" and self.judge is not None)

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if self.labelled_by_judge and self.judge is None:
            problems.append("label_by=judge and there is none; set judge.model")
        if self.label_by == "reward" and self.judge is not None:
            problems.append(
                f"label_by=reward, so judge.model={self.judge.model} would never be asked; set label_by=judge, or "
                "remove judge (one that scores each answer is a reward: rewards: [{function: judge, ...}])"
            )
        if not self.labelled_by_judge and not self.has_reward:
            problems.append("nobody labels the pairs; set judge.model, rewards or reward_model.path")
        if self.pairing == "best_worst" and self.labelled_by_judge:
            problems.append(
                "pairing=best_worst needs a score for each answer, and a judge compares two; set label_by=reward (with "
                "rewards: [{function: judge, ...}] it scores), or pairing=disjoint"
            )
        return problems
