"""Commands that other tools have, and what does the same here."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

_ALGORITHMS = (
    "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline",
    "remax",
)  # fmt: skip
_PREFERENCES = ("ipo", "simpo", "orpo", "kto")

# TRL's command line, OpenRLHF's and verl's scripts, LLaMA-Factory's commands.
HINTS: dict[str, str] = {
    **{name: f"rlhf-ray rl CONFIG algorithm.name={name}" for name in _ALGORITHMS},
    **{name: f"rlhf-ray dpo CONFIG dpo.kind={name}" for name in _PREFERENCES},
    "reward": "rlhf-ray rm CONFIG",
    "reward-model": "rlhf-ray rm CONFIG",
    "train-rm": "rlhf-ray rm CONFIG",
    "train-sft": "rlhf-ray sft CONFIG",
    "train-dpo": "rlhf-ray dpo CONFIG",
    "train-ppo": "rlhf-ray rl CONFIG algorithm.name=ppo",
    "train-ppo-ray": "rlhf-ray rl CONFIG algorithm.name=ppo executor=ray",
    "main-ppo": "rlhf-ray rl CONFIG algorithm.name=ppo executor=ray",
    "train": "rlhf-ray sft | rm | dpo | classifier | rl CONFIG",
    "run": "rlhf-ray sft | rm | dpo | classifier | rl CONFIG",
    "finetune": "rlhf-ray sft CONFIG",
    "env": "rlhf-ray doctor",
    "serve-rm": "rlhf-ray serve-reward CONFIG",
    "vllm-serve": "nothing: a run starts its own generators (generator.engine=vllm)",
    "evaluate": "rlhf-ray eval CONFIG",
    "chat": "rlhf-ray generate MODEL",
    "infer": "rlhf-ray generate MODEL --file FILE",
    "predict": "rlhf-ray generate MODEL --file FILE",
    "validate": "rlhf-ray validate-data FILE",
    "version": "rlhf-ray --version",
}


class HintingGroup(TyperGroup):
    """Refuses a command that is not there with the one that does the same."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        plain = name.lower().replace("_", "-")
        hint = HINTS.get(plain) or HINTS.get(plain.replace("-", "_"))
        if hint is not None and self.get_command(ctx, name) is None:
            ctx.fail(f"no command {name!r} here; what does it is: {hint}")
        return super().resolve_command(ctx, args)
