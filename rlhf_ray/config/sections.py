"""Sections that every training run has, and what a section is.

Sections are frozen and refuse unknown keys.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # what every random generator takes
Clock = Annotated[
    datetime | None,
    Field(description="what chat templates take for now; empty: the run's first start, which its config.yaml keeps"),
]


MOST_WORKERS = 1 << 14  # a plan names each of them


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def contradictions(self) -> list[str]:
        """Settings of a whole config that cannot be meant together: what, why, what to do. RunConfig: see checks.py."""
        return []

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and so pydantic, takes true for 1: `steps: true` would be a run of one step."""
        kind = cls.model_fields[info.field_name].annotation
        kinds = (kind, *get_args(kind))  # of `int | None` and of Literal[0, 1] too
        wanted = any(one in (int, float) or type(one) is int for one in kinds)
        if isinstance(value, bool) and wanted and bool not in kinds:
            raise PydanticCustomError("number_expected", "input should be a number")
        return value


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting of this type holds; optionals and lists are looked through."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := section_in(argument))), None)


class ScratchConfig(Section):
    """Sizes of a model built on the spot (`model.path: scratch:...`).

    The bounds lie beyond any model that exists. Without them a slip of the keyboard is counted, layer by layer, for
    hours, or is a number of bytes that no integer holds.
    """

    hidden_size: int = Field(128, gt=0, le=1 << 16)
    layers: int = Field(3, gt=0, le=1 << 10)
    heads: int = Field(4, gt=0, le=1 << 16)
    intermediate_size: int | None = Field(
        None, gt=0, le=1 << 20, description="MLP width; 4 x hidden_size when empty"
    )
    max_length: int = Field(128, gt=1, le=1 << 24, description="longest sequence, in tokens")
    tie_embeddings: bool = True


class TokenizerConfig(Section):
    """`path` is a Hub name, a folder, or `scratch:char|word|bpe`; empty means the model's own."""

    path: str | None = None
    vocab_size: int = Field(4096, gt=2, le=1 << 24, description="upper bound for scratch:word and scratch:bpe")
    alphabet: str | None = Field(None, description="scratch:char: its characters; read from the data when empty")


class LoraConfig(Section):
    r: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    target_modules: str | list[str] = "all-linear"
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: QLoRA, the learner holds the frozen weights in 4 bits; needs bitsandbytes"
    )


class ModelConfig(Section):
    """`path` is a Hub name, a folder, or `scratch:qwen2|gpt2|lstm`."""

    path: str
    tokenizer: TokenizerConfig = TokenizerConfig()
    scratch: ScratchConfig = ScratchConfig()
    lora: LoraConfig | None = None
    trust_remote_code: bool = False


class RowsConfig(Section):
    """Where rows come from, and how they become text."""

    path: str
    limit: int | None = Field(None, gt=0, description="use only the first rows")
    template: Literal["auto", "chat", "alpaca", "none"] = Field(
        "auto", description="auto: chat for messages, alpaca for instructions, plain text as it is"
    )
    chat_template: str | None = Field(
        None, description="a .jinja file or a built-in name (zephyr); empty: the tokenizer's own"
    )
    chat_template_args: dict[str, Any] = Field({}, description="variables of the template, as enable_thinking: false")
    system_prompt: str | None = Field(None, description="chat: first message of conversations that have none")


class TrainEngineConfig(Section):
    """How a trained model is held and stepped: shared by the learner and the critic."""

    engine: Literal["torch", "deepspeed"] = "torch"
    world_size: int = Field(1, gt=0, le=MOST_WORKERS)
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "parameters"] = "none"
    lr: float = Field(1e-6, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    lr_warmup_steps: int | None = Field(None, ge=0, description="so many steps instead of that share; 0: no warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, of weight matrices; biases and norms are spared")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_steps: int = Field(20, gt=0, description="steps in a row without a finite gradient that end the run")
    tokens_per_microbatch: int = Field(16_384, gt=0, description="padded tokens of one forward and backward pass")
    gradient_checkpointing: bool = False


class RayConfig(Section):
    address: str | None = Field(None, description="empty: $RAY_ADDRESS, or a cluster started here for the run")
    colocate: bool = Field(False, description="generators and learner take turns on the same accelerators")
    cpus_per_worker: float = Field(0.5, ge=0)
    gpus_per_worker: float = Field(1.0, gt=0, description="used when device is cuda")
    start_deadline_s: float = Field(300.0, gt=0)
    call_deadline_s: float = Field(1800.0, gt=0, description="generate, update, score, log-probs")


class CheckpointConfig(Section):
    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, gt=0)


class LoggingConfig(Section):
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]
    samples_every: int = Field(20, gt=0, description="steps between printed completions")
    rollouts: int = Field(16, ge=0, description="completions of each step written to rollouts/")


class TrainingRunConfig(Section):
    """What every run that trains a model has."""

    name: str = "run"
    seed: Seed = 0
    executor: Literal["local", "ray"] = "local"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    clock: Clock = None
    model: ModelConfig
    ray: RayConfig = RayConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
