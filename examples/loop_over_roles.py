"""A loop of one's own over the roles of a run: what `rlhf_ray.rl` does at each step, in the open.

    python examples/loop_over_roles.py
"""

from __future__ import annotations

import rlhf_ray

SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


def right_digits(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text == right) + 0.1 * text.isdigit() for text, right in zip(completions, answer, strict=True)]


def main(steps: int = 20) -> None:
    with rlhf_ray.open_roles(
        model={"path": "scratch:qwen2", "tokenizer": {"path": "scratch:char"}, "scratch": {"max_length": 32}},
        prompts=SUMS, rewards=right_digits, steps=steps, data={"max_prompt_tokens": 16},
        rollout={"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 3}, learner={"lr": 1e-3},
    ) as session:  # fmt: skip
        generator, reward, learner = session.roles.generator, session.roles.reward, session.roles.learner
        learner.push_weights(0)  # from here on the generator holds what the learner holds
        for step in range(steps):
            batch = generator.generate(session.requests(step), session.sampling)  # [B, T]
            scores = reward.score(batch, texts=1)
            batch = batch.replace(score=scores.score)  # [B]
            batch = batch.replace(**session.roles.advantages.estimate(batch, kl_coef=0.0).columns)  # [B, T]
            learner.begin(step, kl_coef=0.0)
            learner.learn(batch)
            gradient = learner.finish()["grad_norm"]
            learner.push_weights(step + 1)
            print(f"step {step + 1}: reward {scores.score.mean():.3f}, {scores.texts[0]}, gradient {gradient:.2f}")


if __name__ == "__main__":
    main()
