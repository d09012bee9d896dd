"""Sections that every training run has, and what a section is.

Sections are frozen and refuse unknown keys.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rlhf_ray.config.engines import TrainerName, TrainingEngine, trainer_facts
from rlhf_ray.config.given import ModelPath, RowsPath, TokenizerPath
from rlhf_ray.config.worker_env import WorkerVariables

Beta = Annotated[float, Field(ge=0, lt=1)]
# What every random generator takes.
Seed = Annotated[int, Field(ge=0, lt=1 << 32, description="every random choice follows from it")]
RunName = Annotated[str, Field(description="of the run's folder, `runs/<name>-<time>`, unless --run-dir names one")]
Device = Annotated[
    Literal["auto", "cuda", "mps", "cpu"], Field(description="auto: the first of cuda, mps and cpu that is there")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(description="what models compute in; auto: bfloat16 on CUDA, else float32"),
]
RunDate = Annotated[
    datetime | None,
    Field(description="what chat templates take for now; empty: the run's first start, which its config.yaml keeps"),
]
TrustRemoteCode = Annotated[bool, Field(description="run the Python code that comes with a model")]
LearningRate = Annotated[float, Field(gt=0, description="AdamW's learning rate, at its highest")]
Schedule = Annotated[
    Literal["constant", "linear", "cosine"],
    Field(description="of the rate after the warm-up; linear and cosine fall to 0 at the last step"),
]
MaxNewTokens = Annotated[int, Field(gt=0, description="longest answer, in tokens; a longer one is cut off")]
TopP = Annotated[float, Field(gt=0, le=1, description="draw from the likeliest tokens that hold this share")]
TopK = Annotated[int, Field(ge=0, description="draw from so many of the likeliest tokens; 0: from all")]

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

    hidden_size: int = Field(128, gt=0, le=1 << 16, description="width of the model")
    layers: int = Field(3, gt=0, le=1 << 10, description="transformer blocks, or LSTM layers")
    heads: int = Field(4, gt=0, le=1 << 16, description="attention heads of each layer; lstm has none")
    intermediate_size: int | None = Field(
        None, gt=0, le=1 << 20, description="MLP width; empty: 4 x hidden_size, of qwen2 3 x; lstm has no MLP"
    )
    max_length: int = Field(128, gt=1, le=1 << 24, description="longest sequence, in tokens")
    tie_embeddings: bool = Field(True, description="the language-model head is the table of the input embeddings")


class TokenizerConfig(Section):
    """How text becomes tokens."""

    path: TokenizerPath | None = Field(
        None, description="a Hub name, a folder, or `scratch:char|word|bpe`; empty: the model's own"
    )
    vocab_size: int = Field(4096, gt=2, le=1 << 24, description="upper bound for scratch:word and scratch:bpe")
    alphabet: str | None = Field(None, description="scratch:char: its characters; read from the data when empty")


class LoraConfig(Section):
    """Small matrices beside frozen weights, which are what is trained (LoRA); merged into the weights at the end."""

    r: int = Field(16, gt=0, description="rank of these matrices")
    alpha: float = Field(32.0, gt=0, description="what they add is multiplied by alpha / r")
    target_modules: str | list[str] = Field(
        "all-linear", description="the layers that get them: all-linear (all but the head), names, or one regular "
        "expression"
    )  # fmt: skip
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: QLoRA, the learner holds the frozen weights in 4 bits; needs bitsandbytes"
    )


class ModelConfig(Section):
    """The model that is trained."""

    path: ModelPath = Field(
        description="a Hub name, a folder, or `scratch:qwen2|gpt2|lstm` (rm, classifier: also `scratch:bert`)"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    scratch: ScratchConfig = ScratchConfig()
    lora: LoraConfig | None = None
    trust_remote_code: TrustRemoteCode = False


class RowsConfig(Section):
    """Where rows come from, and how they become text."""

    path: RowsPath = Field(
        description="a file, a folder, a Hugging Face dataset (owner/name:subset) or `shipped:<file>`; of prompts also "
        "`task:arithmetic`"
    )
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

    engine: TrainerName = Field(
        "torch", description="torch: one process; deepspeed: one or more, with ZeRO; or your own, "
        "`module:function` or `file.py:function` (runs.md)"
    )  # fmt: skip
    world_size: int = Field(1, gt=0, le=MOST_WORKERS, description="deepspeed: processes (ranks) that train together")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="deepspeed: what each rank holds a part of: 0: nothing; 1: the optimiser's state; 2: gradients "
        "too; 3: parameters too"
    )  # fmt: skip
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="deepspeed: what lies in the CPU's memory: the optimiser's state, or the parameters too "
        "(zero_stage 3)"
    )  # fmt: skip
    lr: LearningRate = 1e-6
    lr_schedule: Schedule = "constant"
    lr_warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    lr_warmup_steps: int | None = Field(None, ge=0, description="so many steps instead of that share; 0: no warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, of weight matrices; biases and norms are spared")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="AdamW's memory of gradients and of their squares, from one step to the next"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="a gradient of a larger norm is scaled down to it")
    max_skipped_steps: int = Field(20, gt=0, description="steps in a row without a finite gradient that end the run")
    tokens_per_microbatch: int = Field(16_384, gt=0, description="padded tokens of one forward and backward pass")
    gradient_checkpointing: bool = Field(
        False, description="compute activations anew in the backward pass: less memory, more time"
    )

    @property
    def facts(self) -> TrainingEngine:
        """What is known of this engine."""
        return trainer_facts(self.engine)


class RayConfig(Section):
    """Where the workers of executor=ray run, and how long one may take."""

    address: str | None = Field(None, description="empty: $RAY_ADDRESS, or a cluster started here for the run")
    colocate: bool = Field(False, description="generators and learner take turns on the same accelerators")
    cpus_per_worker: float = Field(
        0.5, ge=0, description="CPUs that each worker reserves; its threads too, if OMP_NUM_THREADS is not set"
    )
    gpus_per_worker: float = Field(1.0, gt=0, description="used when device is cuda")
    env: WorkerVariables = {}
    start_deadline_s: float = Field(
        300.0, gt=0, description="seconds that machines have to join the cluster and to make room, and then the "
        "workers to load their models"
    )  # fmt: skip
    call_deadline_s: float = Field(
        1800.0, gt=0, description="seconds a worker's call may take: generate, update, score, log-probs"
    )
    pulse_s: float = Field(5.0, gt=0, description="seconds between two signs of life of each worker")
    silence_s: float = Field(
        35.0, gt=0, description="seconds beyond that after which a worker that gives none is lost; after a third of "
        "them a line says that it is waited for"
    )  # fmt: skip
    restarts: int = Field(
        3, ge=0, description="times an hour that another process takes the place of a lost worker, before the run "
        "ends; ranks that learn count as one"
    )  # fmt: skip


class CheckpointConfig(Section):
    """What a run can be resumed from."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    background: bool = Field(
        False, description="true: the next step begins as soon as the state is copied, and the copy is written behind "
        "it; it costs the memory of the state once more, and a failure before the end of that step the checkpoint"
    )  # fmt: skip
    keep: int = Field(2, gt=0, description="how many of the newest checkpoints stay; older ones are deleted")
    best_by: str | None = Field(
        None, description="a number in the rows of metrics.jsonl, such as eval/reward or val/loss: the checkpoints of "
        "the steps with the best ones stay, too"
    )  # fmt: skip
    keep_best: int = Field(1, gt=0, description="how many of these")
    best_is: Literal["highest", "lowest"] = Field("highest", description="what is the best")


class LoggingConfig(Section):
    """Where metrics go, and how much of what was written is shown."""

    loggers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        ["tensorboard"], description="who gets the metrics beside metrics.jsonl"
    )
    observers: list[str] = Field(
        [], description="your own code that is told of each step: `module:name` or `file.py:name` of a function, or of "
        "an Observer (runs.md)"
    )  # fmt: skip
    samples_every: int = Field(20, ge=0, description="steps between printed completions; 0: none")
    rollouts: int = Field(16, ge=0, description="completions of each step written to rollouts/")


class TrainingRunConfig(Section):
    """What every run that trains a model has."""

    name: RunName = "run"
    seed: Seed = 0
    executor: Literal["local", "ray"] = Field(
        "local", description="local: everything in one process; ray: in workers, on one machine or many"
    )
    device: Device = "auto"
    dtype: Dtype = "auto"
    clock: RunDate = None
    model: ModelConfig
    ray: RayConfig = RayConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
