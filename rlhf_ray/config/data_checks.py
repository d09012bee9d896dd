"""Settings of a section of data that contradict each other or the model, each with what, why and what to do."""

from __future__ import annotations

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.config.schema import PromptsConfig, RunConfig
from rlhf_ray.config.sections import ModelConfig
from rlhf_ray.config.sources import source_problems


def template_problems(data: PromptsConfig | DatasetConfig, key: str = "data") -> list[str]:
    if data.template in ("alpaca", "none") and (data.chat_template or data.chat_template_args or data.system_prompt):
        return [
            f"{key}.template={data.template} uses no chat template, so {key}.chat_template, {key}.chat_template_args "
            f"and {key}.system_prompt would do nothing; remove them, or set {key}.template=chat"
        ]
    return []


def length_problems(name: str, data: DatasetConfig, model: ModelConfig) -> list[str]:
    if not model.path.startswith("scratch:") or data.max_length <= model.scratch.max_length:
        return []
    return [
        f"{name}.max_length={data.max_length} exceeds model.scratch.max_length={model.scratch.max_length}; "
        "raise the model's or lower the data's"
    ]


def sft_problems(config: RunConfig) -> list[str]:
    """`algorithm.sft_coef` and the rows that it is about."""
    data, coef, problems = config.sft_data, config.algorithm.sft_coef, []
    if (coef > 0) != (data is not None):
        problems.append(
            f"algorithm.sft_coef={coef:g} has no rows to learn; set sft_data.path, or algorithm.sft_coef=0"
            if data is None
            else "algorithm.sft_coef is 0, so the rows of sft_data would not be learned; set it, or remove sft_data"
        )
    if data is None:
        return problems
    problems += source_problems(data, "sft_data")
    problems += [problem for part in data.parts for problem in template_problems(part.data, f"sft_{part.key}")]
    problems += length_problems("sft_data", data, config.model)
    if data.eval_path is not None or data.eval_size or any(part.data.eval_path is not None for part in data.parts):
        problems.append(
            "sft_data.eval_path and sft_data.eval_size hold rows out, and a run judges its policy by rewards alone; "
            "remove them (rlhf-ray eval measures the perplexity of given texts)"
        )
    if data.chat_template not in (None, config.data.chat_template):
        problems.append(
            f"sft_data.chat_template={data.chat_template}: a model has one chat template, which is saved with it; set "
            "data.chat_template for both, or sft_data.template=none or alpaca"
        )
    return problems
