"""GRPO with rewards of one's own, from a program: functions, rows, and an observer of each step.

    python examples/grpo_own_function.py

A small model from scratch learns to answer with three digits in rising order: seconds on a laptop.
"""

from __future__ import annotations

import rlhf_ray
from rlhf_ray.run.observer import StepRecord

ROWS = [{"prompt": f"{number}?", "digits": 3} for number in range(64)]


def rising(completions: list[str], digits: list[int]) -> list[float]:
    """The share of neighbours that rise, in answers of the right length. `digits` is a column of the rows."""
    return [
        sum(a < b for a, b in zip(text, text[1:], strict=False)) / (count - 1)
        if len(text) == count and text.isdigit() else 0.0
        for text, count in zip(completions, digits, strict=True)
    ]  # fmt: skip


async def digits_only(completions: list[str]) -> list[float]:
    """An async function, as one that asks a server would be: it is stopped after the reward's timeout_s."""
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


def show(record: StepRecord) -> None:
    if record.step % 10 == 0:
        print(f"step {record.step}: rising {record.metrics['reward/rising']:.2f}")


def main(steps: int = 60, run_dir: str | None = None) -> None:
    result = rlhf_ray.rl(
        model={"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char"},
               "scratch": {"hidden_size": 64, "layers": 2, "max_length": 16}},
        prompts=ROWS, rewards=[rising, (digits_only, 0.3)], steps=steps, observers=[show], run_dir=run_dir,
        data={"max_prompt_tokens": 8}, rollout={"prompts_per_step": 16, "group_size": 8, "max_new_tokens": 4},
        learner={"lr": 3e-3},
    )  # fmt: skip
    print(result)
    for sample in result.samples[:3]:
        print(sample)
    print(f"the model: {result.model}; last step: {result.metrics[-1]['reward/mean']:.2f}")


if __name__ == "__main__":
    main()
