"""Every setting of a supervised run: `rlhf-ray sft | rm | dpo | classifier`.

One loop, four losses: what the four share is `SupervisedConfig`; each adds a section of its own, and refuses settings
that contradict each other (`contradictions`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.checks import (
    engine_problems,
    quantize_problems,
    scratch_problems,
    tokenizer_problems,
)
from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.config.data_checks import length_problems, template_problems
from rlhf_ray.config.given import RowsPath
from rlhf_ray.config.ray_checks import shared_gpu_problems
from rlhf_ray.config.sections import (
    LearningRate,
    LoggingConfig,
    ModelConfig,
    RunName,
    Schedule,
    Section,
    TrainEngineConfig,
    TrainingRunConfig,
)
from rlhf_ray.config.sources import source_problems

Epochs = Annotated[float, Field(gt=0, description="passes over the rows, which may end within one (1.5)")]


class SupervisedLearnerConfig(TrainEngineConfig):
    """How the model is trained."""

    batch_size: int = Field(32, gt=0, description="examples, or pairs (rm, dpo but for kto), of each optimiser step")
    lr: LearningRate = 1e-5
    lr_schedule: Schedule = "linear"


class ValidationConfig(Section):
    """Validation runs on the held-out rows of `data`; it decides which weights are kept and when to stop."""

    every: int = Field(0, ge=0, description="steps between validations; 0: after every epoch")
    patience: int | None = Field(None, gt=0, description="stop after so many validations without a better loss")
    min_improvement: float = Field(0.0, ge=0, description="what counts as better, in units of the loss")
    keep_best: bool = Field(True, description="end with the weights of the lowest validation loss, not the last ones")
    test_path: RowsPath | None = Field(None, description="rows to judge the final weights on, and for nothing else")


class SupervisedLoggingConfig(LoggingConfig):
    """As in `rl`, but that samples are written for nothing else, so that they come less often."""

    samples_every: int = Field(100, ge=0, description="sft: steps between printed completions; 0: none")


class SupervisedConfig(TrainingRunConfig):
    """What all four share. `steps` overrides `epochs`."""

    scratch_kinds: ClassVar[tuple[str, ...]] = ("qwen2", "gpt2", "lstm")

    name: RunName = "supervised"
    epochs: Epochs = 1.0
    steps: int | None = Field(None, gt=0, description="optimiser steps; empty: as many as `epochs` takes")
    data: DatasetConfig
    learner: SupervisedLearnerConfig = SupervisedLearnerConfig()
    eval: ValidationConfig = ValidationConfig()
    logging: SupervisedLoggingConfig = SupervisedLoggingConfig()

    def contradictions(self, device: str | None = None) -> list[str]:
        """Everything that can be refused from the config alone; `device` is what `auto` has turned out to be."""
        return [
            *scratch_problems(self.model, self.scratch_kinds),
            *tokenizer_problems(self.model),
            *engine_problems("learner", self.learner, self.executor, device or self.device),
            *quantize_problems(self.model.lora, self.learner.facts, device or self.device),
            *self._shared_gpus(device or self.device),
            *_learner_problems(self.learner, self.model),
            *source_problems(self.data),
            *(problem for part in self.data.parts for problem in template_problems(part.data, part.key)),
            *length_problems("data", self.data, self.model),
            *_validation_problems(self.data, self.eval),
        ]

    def _shared_gpus(self, device: str) -> list[str]:
        ranks = {"learner.world_size": self.learner.world_size}
        return shared_gpu_problems(self.ray, ranks) if self.executor == "ray" and device == "cuda" else []


def _learner_problems(learner: SupervisedLearnerConfig, model: ModelConfig) -> list[str]:
    problems = []
    if learner.world_size > learner.batch_size:
        problems.append(
            f"learner.world_size={learner.world_size} ranks share learner.batch_size={learner.batch_size}, so some "
            "would have nothing to do; use fewer ranks or a larger batch"
        )
    if learner.gradient_checkpointing and model.path == "scratch:lstm":
        problems.append("learner.gradient_checkpointing has nothing to recompute in scratch:lstm; set it to false")
    return problems


def _validation_problems(data: DatasetConfig, validation: ValidationConfig) -> list[str]:
    own_split = data.eval_path is not None or any(part.data.eval_path is not None for part in data.parts)
    if validation.patience is None or own_split or data.eval_size > 0:
        return []
    return [
        "eval.patience stops on the validation loss, and there are no rows to validate on; "
        "set data.eval_size or data.eval_path, or leave eval.patience empty"
    ]


class PlainTextConfig(Section):
    """Plain text among the instruction data, so that the model does not forget how to continue any other text."""

    data: DatasetConfig
    share: float = Field(0.1, gt=0, lt=1, description="of the rows of each batch")


class SamplesConfig(Section):
    """Greedy completions of held-out prompts: before and after, in summary.json; in between, on the screen."""

    count: int = Field(4, ge=0, description="how many prompts; 0: none")
    max_new_tokens: int = Field(48, gt=0, description="of each completion")


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning: a model learns the answers, or whole texts, of `data`."""

    name: RunName = "sft"
    epochs: Epochs = 3.0
    plain_text: PlainTextConfig | None = None
    samples: SamplesConfig = SamplesConfig()

    def contradictions(self, device: str | None = None) -> list[str]:
        problems, rows = super().contradictions(device), self.plain_text_rows
        if self.plain_text is None:
            return problems
        problems += length_problems("plain_text.data", self.plain_text.data, self.model)
        if self.plain_text.data.sources:
            problems.append("plain_text.data.sources: the plain text is one source; set plain_text.data.path")
        if not 0 < rows < self.learner.batch_size:
            problems.append(
                f"plain_text.share={self.plain_text.share} of learner.batch_size={self.learner.batch_size} is {rows} "
                "rows, so one of the two kinds would be missing; change the share, or raise the batch size"
            )
        return problems

    @property
    def plain_text_rows(self) -> int:
        """Of each batch."""
        return 0 if self.plain_text is None else round(self.plain_text.share * self.learner.batch_size)


class RMLossConfig(Section):
    """The reward model's loss on pairs."""

    margin_scale: float = Field(
        1.0, ge=0, description="times a pair's margin (its column, or the difference of two scores); 0: without margins"
    )


class RMConfig(SupervisedConfig):
    """A reward model that learns which of two answers is better: `data` holds pairs or rankings."""

    scratch_kinds: ClassVar[tuple[str, ...]] = ("qwen2", "gpt2", "lstm", "bert")

    name: RunName = "rm"
    rm: RMLossConfig = RMLossConfig()


# What each paper sets, where the config says nothing.
_BETA_OF_KIND = {"simpo": 2.0}


class DPOLossConfig(Section):
    """What is minimised."""

    kind: Literal["sigmoid", "ipo", "kto", "simpo", "orpo"] = Field(
        "sigmoid", description="sigmoid (DPO), ipo and kto have a reference, simpo and orpo have none; kto learns from "
        "single answers that are good or bad"
    )  # fmt: skip
    beta: float = Field(
        0.1, gt=0, description="sigmoid, ipo, kto: strength of the pull towards the reference; simpo: scale of the "
        "rewards (2.0 when empty); orpo: weight of the odds ratio (the paper's lambda)"
    )  # fmt: skip
    gamma: float = Field(1.0, ge=0, description="simpo: the margin that chosen answers are to have")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="cDPO: the share of labels taken to be wrong")
    nll_weight: float = Field(0.0, ge=0, description="adds the chosen answer's negative log-likelihood a token (RPO)")
    desirable_weight: float = Field(1.0, gt=0, description="kto: of the good answers' losses")
    undesirable_weight: float = Field(1.0, gt=0, description="kto: of the bad answers' losses")
    reference: str | None = Field(None, description="a model folder; empty: the policy before its first step")

    @model_validator(mode="before")
    @classmethod
    def _fill_beta(cls, given: Any) -> Any:
        beta = _BETA_OF_KIND.get(given.get("kind")) if isinstance(given, dict) else None
        return given if beta is None else {"beta": beta, **given}

    @property
    def needs_reference(self) -> bool:
        return self.kind in ("sigmoid", "ipo", "kto")


class DPOLearnerConfig(SupervisedLearnerConfig):
    """How the model is trained."""

    lr: LearningRate = 5e-7


class DPOConfig(SupervisedConfig):
    """A policy that learns from preferences without a reward model (DPO and its like).

    `data` holds pairs or rankings; with `dpo.kind: kto` answers with a label, or pairs.
    """

    name: RunName = "dpo"
    learner: DPOLearnerConfig = DPOLearnerConfig()
    dpo: DPOLossConfig = DPOLossConfig()

    def contradictions(self, device: str | None = None) -> list[str]:
        problems, loss = super().contradictions(device), self.dpo
        if loss.kind != "sigmoid" and loss.label_smoothing > 0:
            problems.append(
                f"dpo.label_smoothing belongs to the sigmoid loss, and dpo.kind={loss.kind} has no such term; "
                "set dpo.kind=sigmoid or dpo.label_smoothing=0"
            )
        if not loss.needs_reference and loss.reference is not None:
            problems.append(f"dpo.kind={loss.kind} has no reference; remove dpo.reference, or set dpo.kind=sigmoid")
        if loss.kind not in ("sigmoid", "ipo") and loss.nll_weight > 0:
            has = f"{loss.kind}'s loss has {'such a term already' if loss.kind == 'orpo' else 'no such term'}"
            problems.append(f"dpo.nll_weight={loss.nll_weight}: {has}; set it to 0, or dpo.kind=sigmoid or ipo")
        return [*problems, *self._kto_problems()]

    def _kto_problems(self) -> list[str]:
        loss, problems = self.dpo, []
        if loss.kind == "kto" and self.learner.batch_size == 1:
            problems.append(
                "dpo.kind=kto estimates the KL from answers to the other prompts of a batch, and learner.batch_size=1 "
                "has none; raise it"
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if loss.kind != "kto" and getattr(loss, name) != 1:
                problems.append(
                    f"dpo.{name} belongs to kto, and dpo.kind={loss.kind} learns from pairs; set dpo.kind=kto, or "
                    "remove it"
                )
        return problems


class HeadConfig(Section):
    """The classes, and how much of the model learns them."""

    labels: list[str] | None = Field(None, description="names of labels 0, 1, ...; empty: label_0, label_1, ...")
    frozen_layers: int = Field(0, ge=0, description="this many first layers, and the embeddings, do not learn")


class ClassifierConfig(SupervisedConfig):
    """A classifier of texts.

    `model.path` is an encoder's or a causal model's folder or Hub name, or `scratch:bert|qwen2|gpt2|lstm`.
    """

    scratch_kinds: ClassVar[tuple[str, ...]] = ("qwen2", "gpt2", "lstm", "bert")

    name: RunName = "classifier"
    classifier: HeadConfig = HeadConfig()

    def contradictions(self, device: str | None = None) -> list[str]:
        problems, frozen = super().contradictions(device), self.classifier.frozen_layers
        if frozen and self.model.lora is not None:
            problems.append(
                "classifier.frozen_layers and model.lora: LoRA freezes every layer and adapts it; set one of the two"
            )
        if frozen and self.model.path.startswith("scratch:"):
            problems.append(
                f"classifier.frozen_layers={frozen}: in {self.model.path} these layers would keep random numbers for "
                "ever; set it to 0, or start from a trained model"
            )
        return problems


SCHEMAS: dict[str, type[SupervisedConfig]] = {
    "sft": SFTConfig,
    "rm": RMConfig,
    "dpo": DPOConfig,
    "classifier": ClassifierConfig,
}
