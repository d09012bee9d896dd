"""Align language models with reinforcement learning from human, AI or programmatic feedback.

    import rlhf_ray

    result = rlhf_ray.rl(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        prompts=[{"prompt": "Name a city.", "answer": "Bergen"}, ...],
        rewards=lambda completions, answer: [float(a in c) for c, a in zip(completions, answer)],
        steps=50,
    )
    result.metrics, result.samples, result.model

What YAML files start, functions start: `rl`, `sft`, `rm`, `dpo`, `evaluate`; `load_config` gives the settings of one,
`open_roles` the roles of an `rl` run without its loop. docs/python.md has it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.api import dpo, evaluate, load_config, open_roles, rl, rm, sft

    __version__: str

__all__ = ["__version__", "dpo", "evaluate", "load_config", "open_roles", "rl", "rm", "sft"]


def __getattr__(name: str) -> Any:
    """Lazy: to import the package costs nothing, so that each worker of a cluster may load its own part alone."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhf-ray")
    if name in __all__:
        from rlhf_ray import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
