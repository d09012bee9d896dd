"""Tokens a second of the local generator against plain `model.generate`, in turns in one process.

    python benchmarks/generation.py [--shapes short prompts large] [--rounds 3] [--json result.json]

Both sample the same tokens with the same keyed random numbers, and compute the prompt of a group once. A side's figure
is the processor time of this process in its fastest round: what else a machine does only adds to it. Set
OMP_NUM_THREADS=1, for processor time counts all threads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.roles.decode_forward import left_padded, positions
from rlhf_ray.roles.generator_hf import HFGenerator
from rlhf_ray.roles.protocols import Request, Sampling
from rlhf_ray.roles.sampler import draw, keyed_uniform, seeds_of

PAD, EOS, VOCABULARY = 0, 1, 33


@dataclass(frozen=True)
class Shape:
    """`groups` prompts of `prompt` tokens, `members` answers to each of up to `new` tokens."""

    hidden: int
    layers: int
    groups: int
    members: int
    prompt: int
    new: int


SHAPES = {
    "short": Shape(160, 4, 8, 8, 10, 64),  # 1.3M parameters
    "prompts": Shape(160, 4, 2, 8, 512, 64),
    "long": Shape(160, 4, 4, 8, 16, 256),
    "large": Shape(640, 10, 4, 4, 16, 32),  # 51M
}


class Keyed(LogitsProcessor):
    """Makes greedy search draw: the chosen token's score becomes infinite."""

    def __init__(self, seeds: list[int], width: int, sampling: Sampling) -> None:
        self.seed_B, self.width, self.sampling, self.logps = seeds_of(seeds), width, sampling, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u_B = keyed_uniform(self.seed_B, input_ids.shape[1] - self.width).float()
        token_B, logp_B = draw(scores, u_B, [1.0] * len(u_B), self.sampling)
        self.logps.append(logp_B)
        return scores.scatter(-1, token_B[:, None], float("inf"))


@torch.no_grad()
def plain(model: PreTrainedModel, requests: list[Request], sampling: Sampling) -> list[list[int]]:
    """`model.generate` behind a prompt pass that the members of a group share."""
    prompts = list(dict.fromkeys(request.token_ids for request in requests))
    tokens, mask = left_padded(prompts, PAD, model.device)
    rows = torch.tensor([prompts.index(request.token_ids) for request in requests])
    cache: DynamicCache = model(
        input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], position_ids=positions(mask)[:, :-1], use_cache=True,
        logits_to_keep=1,
    ).past_key_values  # fmt: skip
    cache.reorder_cache(rows)
    keyed = Keyed([request.seed for request in requests], tokens.shape[1], sampling)
    output = model.generate(
        input_ids=tokens[rows], attention_mask=mask[rows], past_key_values=cache, do_sample=False,
        max_new_tokens=sampling.max_new_tokens, logits_processor=LogitsProcessorList([keyed]), eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    answers = output[:, tokens.shape[1] :].tolist()
    return [answer[: answer.index(EOS) + 1] if EOS in answer else answer for answer in answers]


def sides(shape: Shape) -> tuple[dict[str, Callable[[int], list[list[int]]]], int]:
    """Each side as a function from a step's number to its answers; the parameters of their model."""
    torch.manual_seed(0)
    model = build_scratch(
        "qwen2", vocab_size=VOCABULARY, hidden_size=shape.hidden, layers=shape.layers, heads=max(4, shape.hidden // 64),
        intermediate_size=3 * shape.hidden, max_length=shape.prompt + shape.new, eos_token_id=EOS, pad_token_id=PAD,
    ).eval()  # fmt: skip
    generator = HFGenerator(model, pad_token_id=PAD, kv_cache_gb=1.0)
    sampling = Sampling(shape.new, stop_token_ids=(EOS,))

    def asked(step: int) -> list[Request]:
        group = torch.Generator().manual_seed(step)
        prompts = torch.randint(2, VOCABULARY, (shape.groups, shape.prompt), generator=group).tolist()
        rows = [prompt for prompt in prompts for _ in range(shape.members)]
        return [Request(row // shape.members, row, tuple(p), 1000 * step + row) for row, p in enumerate(rows)]

    def ours(step: int) -> list[list[int]]:
        batch = generator.generate(asked(step), sampling)
        return [row[mask].tolist() for row, mask in zip(batch.tokens, batch.response_mask, strict=True)]

    made = {"generate": lambda step: plain(model, asked(step), sampling), "ours": ours}
    return made, sum(p.numel() for p in model.parameters())


def compare(shape: Shape, rounds: int) -> dict[str, float]:
    made, parameters = sides(shape)
    rates = dict.fromkeys(made, 0.0)
    same = total = 0
    for step in range(rounds + 1):  # the first warms up
        answers = {}
        for name in made if step % 2 else reversed(made):
            start = time.process_time()
            answers[name] = made[name](step)
            seconds = time.process_time() - start
            if step:
                rates[name] = max(rates[name], sum(map(len, answers[name])) / seconds)
        same += sum(a == b for a, b in zip(answers["generate"], answers["ours"], strict=True))
        total += len(answers["ours"])
    return {
        "parameters": parameters, **{f"{name}_tokens_per_s": round(rate, 1) for name, rate in rates.items()},
        "times": round(rates["ours"] / rates["generate"], 3), "same_answers": same / total,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.shapes:
        results[name] = compare(SHAPES[name], args.rounds)
        print(name, json.dumps(results[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
