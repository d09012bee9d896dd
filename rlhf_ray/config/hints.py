"""Settings as TRL, verl, OpenRLHF, LLaMA-Factory and Transformers call them, and what they are called here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, get_origin

from pydantic import BaseModel

from rlhf_ray.config.sections import section_in

# The end of the foreign name, one part or several -> what it is here: the first that the command has is named.
FOREIGN: dict[str, tuple[str, ...]] = {
    "beta": ("dpo.beta", "algorithm.kl_coef"),
    "pref_beta": ("dpo.beta",),
    "kl_loss_coef": ("algorithm.kl_coef",),
    "init_kl_coef": ("algorithm.kl_coef",),
    "kl_ctrl": ("algorithm.kl_controller",),
    "kl_ctrl.type": ("algorithm.kl_controller",),
    "kl_ctrl.target_kl": ("algorithm.kl_target",),
    "kl_ctrl.horizon": ("algorithm.kl_horizon",),
    "use_kl_loss": ("algorithm.kl_in",),
    "use_kl_in_reward": ("algorithm.kl_in",),
    "adv_estimator": ("algorithm.advantage",),
    "advantage_estimator": ("algorithm.advantage",),
    "pref_loss": ("dpo.kind",),
    "loss_type": ("dpo.kind", "algorithm.policy_loss"),
    "loss_agg_mode": ("algorithm.aggregation",),
    "epsilon": ("algorithm.clip_low",),
    "cliprange": ("algorithm.clip_low",),
    "clip_ratio": ("algorithm.clip_low",),
    "clip_range": ("algorithm.clip_low",),
    "eps_clip": ("algorithm.clip_low",),
    "epsilon_high": ("algorithm.clip_high",),
    "clip_ratio_high": ("algorithm.clip_high",),
    "cliprange_value": ("critic.value_clip",),
    "value_clip": ("critic.value_clip",),
    "entropy_coeff": ("algorithm.entropy_coef",),
    "ent_coef": ("algorithm.entropy_coef",),
    "lambd": ("algorithm.lam",),
    "gae_lambda": ("algorithm.lam",),
    "ptx_coef": ("algorithm.sft_coef",),
    "pretrain_data": ("sft_data.path",),
    "scale_rewards": ("algorithm.normalize_std",),
    "norm_adv_by_std_in_grpo": ("algorithm.normalize_std",),
    "target_kl": ("learner.stop_kl",),
    "learning_rate": ("learner.lr",),
    "actor_learning_rate": ("learner.lr",),
    "critic_learning_rate": ("critic.lr",),
    "lr_scheduler_type": ("learner.lr_schedule",),
    "lr_scheduler": ("learner.lr_schedule",),
    "warmup_steps": ("learner.lr_warmup_steps",),
    "num_warmup_steps": ("learner.lr_warmup_steps",),
    "adam_beta1": ("learner.betas",),
    "adam_betas": ("learner.betas",),
    "max_norm": ("learner.max_grad_norm",),
    "grad_clip": ("learner.max_grad_norm",),
    "gradient_accumulation_steps": ("learner.tokens_per_microbatch",),
    "per_device_train_batch_size": ("learner.batch_size", "rollout.prompts_per_step"),
    "micro_train_batch_size": ("learner.tokens_per_microbatch",),
    "ppo_micro_batch_size_per_gpu": ("learner.tokens_per_microbatch",),
    "ppo_max_token_len_per_gpu": ("learner.tokens_per_microbatch",),
    "train_batch_size": ("learner.batch_size", "rollout.prompts_per_step"),
    "rollout_batch_size": ("rollout.prompts_per_step",),
    "ppo_mini_batch_size": ("learner.minibatches",),
    "num_mini_batches": ("learner.minibatches",),
    "ppo_epochs": ("learner.epochs",),
    "num_ppo_epochs": ("learner.epochs",),
    "num_iterations": ("learner.epochs",),
    "num_train_epochs": ("epochs", "steps"),
    "total_epochs": ("epochs", "steps"),
    "max_epochs": ("epochs", "steps"),
    "max_steps": ("steps",),
    "total_training_steps": ("steps",),
    "num_generations": ("rollout.group_size",),
    "n_samples_per_prompt": ("rollout.group_size",),
    "rollout_n": ("rollout.group_size",),
    "rollout.n": ("rollout.group_size",),
    "rollout.name": ("generator.engine",),
    "actor.optim.lr": ("learner.lr",),
    "critic.optim.lr": ("critic.lr",),
    "optim.lr": ("learner.lr",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_response_length": ("rollout.max_new_tokens",),
    "response_length": ("rollout.max_new_tokens",),
    "generate_max_len": ("rollout.max_new_tokens",),
    "max_prompt_length": ("data.max_prompt_tokens",),
    "prompt_max_len": ("data.max_prompt_tokens",),
    "max_seq_length": ("data.max_length",),
    "max_len": ("data.max_length",),
    "cutoff_len": ("data.max_length",),
    "use_vllm": ("generator.engine",),
    "vllm_mode": ("ray.colocate",),
    "colocate_all_models": ("ray.colocate",),
    "hybrid_engine": ("ray.colocate",),
    "vllm_num_engines": ("generator.count",),
    "vllm_tensor_parallel_size": ("generator.tensor_parallel",),
    "tensor_model_parallel_size": ("generator.tensor_parallel",),
    "tensor_parallel_size": ("generator.tensor_parallel",),
    "vllm_gpu_memory_utilization": ("generator.gpu_memory_utilization",),
    "model_name_or_path": ("model.path",),
    "model_name": ("model.path",),
    "pretrain": ("model.path",),
    "reward_model_path": ("reward_model.path",),
    "reward_pretrain": ("reward_model.path",),
    "reward_funcs": ("rewards",),
    "remote_rm_url": ("rewards",),
    "custom_reward_function": ("rewards",),
    "reward_weights": ("rewards",),
    "reward.function": ("rewards",),
    "reward.weight": ("rewards",),
    "reward.path": ("reward_model.path",),
    "reward.num_workers": ("reward.count",),
    "reward_num_nodes": ("reward.count",),
    "reward_num_gpus_per_node": ("reward.world_size",),
    "ref_num_nodes": ("reference.count",),
    "ref_num_gpus_per_node": ("reference.world_size",),
    "dataset": ("data.path",),
    "dataset_name": ("data.path",),
    "dataset_path": ("data.path",),
    "prompt_data": ("data.path",),
    "train_files": ("data.path",),
    "val_files": ("data.eval_path",),
    "input_key": ("data.field", "data.columns"),
    "prompt_key": ("data.field", "data.columns"),
    "label_key": ("data.columns",),
    "use_peft": ("model.lora",),
    "finetuning_type": ("model.lora",),
    "lora_r": ("model.lora.r",),
    "lora_rank": ("model.lora.r",),
    "lora_alpha": ("model.lora.alpha",),
    "lora_target": ("model.lora.target_modules",),
    "lora_target_modules": ("model.lora.target_modules",),
    "load_in_4bit": ("model.lora.quantize",),
    "bf16": ("dtype",),
    "torch_dtype": ("dtype",),
    "param_dtype": ("dtype",),
    "deepspeed": ("learner.engine",),
    "use_deepspeed": ("learner.engine",),
    "adam_offload": ("learner.offload",),
    "num_gpus": ("learner.world_size",),
    "n_gpus_per_node": ("learner.world_size",),
    "actor_num_gpus_per_node": ("learner.world_size",),
    "output_dir": ("--run-dir",),
    "save_path": ("--run-dir",),
    "default_local_dir": ("--run-dir",),
    "resume_from_checkpoint": ("--resume auto",),
    "save_steps": ("checkpoint.every",),
    "save_freq": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "eval_steps": ("eval.every",),
    "test_freq": ("eval.every",),
    "report_to": ("logging.loggers",),
    "logger": ("logging.loggers",),
    "use_wandb": ("logging.loggers",),
    "run_name": ("name",),
    "experiment_name": ("name",),
    "label_smoothing": ("dpo.label_smoothing",),
    "rpo_alpha": ("dpo.nll_weight",),
    "pref_ftx": ("dpo.nll_weight",),
    "desirable_weight": ("dpo.desirable_weight",),
    "undesirable_weight": ("dpo.undesirable_weight",),
    "kto_chosen_weight": ("dpo.desirable_weight",),
    "kto_rejected_weight": ("dpo.undesirable_weight",),
    "simpo_gamma": ("dpo.gamma",),
    "gamma_beta_ratio": ("dpo.gamma",),
}


_MOST = 3  # settings of one name, or of one section, that a hint lists


def hint_for(key: str, schema: type[BaseModel]) -> str | None:
    """What `key` of another tool, or of another section, is in a config of `schema`; None if it is nothing known.

    `key` may be dotted: the longest end of it that is known decides (verl's `actor_rollout_ref.rollout.n`).
    """
    parts = key.lower().replace("-", "_").split(".")
    for start in range(len(parts)):
        end = parts[start:]
        for name in FOREIGN.get(".".join(end), ()):
            if name.startswith("--") or has_setting(schema, name.split(".")):
                return name
        if start > 0 and len(end) > 1 and has_setting(schema, end):
            return ".".join(end)
    places = list(_places(schema, parts[-1]))
    return " or ".join(places) if 0 < len(places) <= _MOST else None


def hints_in(key: str, value: Any, schema: type[BaseModel]) -> str | None:
    """`hint_for` of each setting of an unknown section, with its name; None if none is known."""
    known = [(name, hint) for name in _names(key, value) if (hint := hint_for(name, schema)) is not None]
    if not known:
        return None
    listed = "; ".join(f"{name} is {hint}" for name, hint in known[:_MOST])
    return f"here {listed}{'; ...' if known[_MOST:] else ''}"


def _names(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            yield from _names(f"{key}.{part}", inner)
    else:
        yield key


def _places(schema: type[BaseModel], name: str, before: str = "") -> Iterator[str]:
    """Dotted names of the settings called `name` in the sections of `schema`."""
    for key, field in schema.model_fields.items():
        if key == name and before:
            yield before + key
        section = section_in(field.annotation)
        if section is not None and get_origin(field.annotation) not in (list, dict):
            yield from _places(section, name, f"{before}{key}.")


def has_setting(schema: type[BaseModel], parts: Iterable[str]) -> bool:
    """Whether a config of `schema` has the setting; optional sections and lists are looked through."""
    section: type[BaseModel] | None = schema
    for part in parts:
        if section is None or part not in section.model_fields:
            return False
        section = section_in(section.model_fields[part].annotation)
    return True
