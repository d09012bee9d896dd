"""What `learner.share_prompts` saves: one policy update with and without it, in turns.

    python benchmarks/shared_prompts.py [--rounds 5]

Each shape is a batch of groups whose answers have random lengths, the given one at most; the model is a small Qwen2
shape. A line of several answers has a mask, and attention with a mask pays for all pairs of its tokens: so sharing
wins most where prompts are long and answers short, and is left alone where it would lose (`PromptSharing.pays`).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import LearnerConfig
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.batch import Batch, build_batch
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.protocols import Request
from rlhf_ray.sync.sender import InProcessSender

SHAPES = ((56, 16, 6, 4), (4, 16, 32, 32), (4, 8, 128, 32), (2, 8, 512, 64), (2, 8, 64, 256), (2, 8, 16, 512))
VOCAB = 1000


def batch_of(groups: int, size: int, prompt: int, answer: int) -> Batch:
    dice = random.Random(0)
    prompts = [tuple(dice.choices(range(2, VOCAB), k=prompt)) for _ in range(groups)]
    requests = [Request(i // size, i, prompts[i // size], seed=i) for i in range(groups * size)]
    answers = [dice.choices(range(2, VOCAB), k=dice.randint(1 + answer // 2, answer)) for _ in requests]
    logps = [[-1.0] * len(tokens) for tokens in answers]
    batch = build_batch(requests, answers, logps, truncated=[False] * len(requests), weight_version=0)
    advantages = torch.randn(len(batch), 1, generator=torch.Generator().manual_seed(0))
    return batch.replace(advantages=advantages * batch.response_mask)


def learner_of(share_prompts: bool) -> Learner:
    model = build_scratch("qwen2", vocab_size=VOCAB, hidden_size=128, layers=3, heads=4, max_length=4096)
    config = LearnerConfig(lr=1e-4, tokens_per_microbatch=2048, share_prompts=share_prompts)
    return Learner(
        TorchEngine(model), config, AlgorithmConfig(), tokenizer=None, temperature=1.0, max_new_tokens=1,
        sender=InProcessSender(capacity=1 << 20), seed=0, total_steps=1,
    )  # fmt: skip


def seconds(learner: Learner, batch: Batch) -> float:
    started = time.perf_counter()
    learner.begin(0, 0.0)
    learner.learn(batch)
    learner.finish()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("groups x answers, prompt + answer tokens | own prompts | share_prompts | times faster")
    for groups, size, prompt, answer in SHAPES:
        batch = batch_of(groups, size, prompt, answer)
        learners = [learner_of(False), learner_of(True)]
        for learner in learners:
            seconds(learner, batch)  # warm-up
        spent = [[seconds(learner, batch) for learner in learners] for _ in range(rounds)]
        own, shared = (statistics.median(column) for column in zip(*spent, strict=True))
        ratio = statistics.median(a / b for a, b in spent)
        shape = f"{groups} x {size}, {prompt} + {answer}"
        print(f"{shape:>40} | {own:9.3f} s | {shared:11.3f} s | {ratio:.2f}")


if __name__ == "__main__":
    main()
