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
    """Refuses a command or an option that is not there with what does the same."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        plain = name.lower().replace("_", "-")
        hint = HINTS.get(plain) or HINTS.get(plain.replace("-", "_"))
        command = self.get_command(ctx, name)
        if hint is not None and command is None:
            ctx.fail(f"no command {name!r} here; what does it is: {hint}")
        if command is not None and any(parameter.name == "overrides" for parameter in command.params):
            _refuse_settings_as_options(ctx, command, args)
        return super().resolve_command(ctx, args)


def _refuse_settings_as_options(ctx: Any, command: Any, args: list[str]) -> None:
    """`--learning_rate 1e-5`, as TRL and OpenRLHF have it, is `learner.lr=1e-5` here."""
    there = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for place, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if not option.startswith("--") or option in there:
            continue
        if option == "--":
            return
        if option.replace("_", "-") in ("--config", "--config-file"):
            ctx.fail(f"no option {option} here; the file comes first: rlhf-ray {args[0]} FILE")
        following = args[place + 1] if place + 1 < len(args) else ""
        value = value or ("VALUE" if following.startswith("--") else following) or "VALUE"
        hint = _setting_of(args[0], option.removeprefix("--"))
        if hint is not None:
            is_setting = not hint.startswith("--")
            ctx.fail(
                f"no option {option} here; "
                + (f"a setting stands without dashes: {hint}={value}" if is_setting else f"what does it is {hint}")
            )


def _setting_of(command: str, name: str) -> str | None:
    from rlhf_ray.config.hints import has_setting, hint_for
    from rlhf_ray.config.pipeline import COMMANDS

    schema = COMMANDS.get(command)
    if schema is None:
        return None
    return name if has_setting(schema, name.split(".")) else hint_for(name, schema)
