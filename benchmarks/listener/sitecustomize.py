"""Listens inside the processes of a run, for `benchmarks/same_numbers.py`: what each sample consists of.

Python imports a module of this name when it starts, so with this folder on PYTHONPATH every process of a run listens,
Ray's workers too, and the product knows nothing of it. Each process writes a file of its own to $SAME_NUMBERS_OUT,
one JSON object a sample: its tokens, log-probabilities and weight version, and (where the house draws as that of commit
0ef2e8f does) how close the random number of each token was to giving another one.

$SAME_NUMBERS_ANSWERS holds what another checkout has written for the same requests. A sample with other tokens is
noted as it is and then becomes that one: what follows is compared as if the draw had not differed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

OUT, ANSWERS = os.environ.get("SAME_NUMBERS_OUT"), os.environ.get("SAME_NUMBERS_ANSWERS")
CHECKOUT = os.environ.get("SAME_NUMBERS_CHECKOUT", "")
CLOSE = 1e-5

margins_of_last: list[list[float]] = []  # of the rows that were sampled last, for the batch that is made of them next
margins_by_sample: dict[int, list[float]] = {}  # of the samples that are about to be made
near_by_seed: dict[int, list[float]] = {}  # vLLM: of each draw of a request, 0.0 if it was close and 1.0 if not


# ---- samples ----------------------------------------------------------------------------------------------------


def hook_sample(module: Any) -> None:
    """Every sample is written down, and takes the other checkout's answer where it has another one."""
    import numpy as np

    check = module.Sample.__post_init__

    def note_and_force(sample: Any) -> None:
        check(sample)
        version = int(sample.versions[0]) if len(sample.versions) else -1
        row = {
            "sample": sample.sample_id, "prompt_id": sample.prompt_id, "version": version,
            "start": sample.spans[0][0], "tokens": sample.tokens.tolist(), "logp": sample.logprobs.tolist(),
            "truncated": sample.truncated, "margins": margins_by_sample.pop(sample.sample_id, []),
        }  # fmt: skip
        write(row)
        other = answers().get(key_of(row))
        if other is None or (other["tokens"], other["truncated"]) == (row["tokens"], row["truncated"]):
            return
        written = len(other["logp"])
        forced = {
            "tokens": np.asarray(other["tokens"], sample.tokens.dtype),
            "spans": ((other["start"], other["start"] + written),),
            "logprobs": np.asarray(other["logp"], np.float32),
            "versions": np.full(written, version, np.int32),
            "ended": "length" if other["truncated"] else "stop",
        }
        for name, value in forced.items():
            object.__setattr__(sample, name, value)

    module.Sample.__post_init__ = note_and_force


def hook_batch(module: Any) -> None:
    """The house before samples: its rows are written down where they become a batch."""
    build, alone = getattr(module, "build_batch", None), importlib.util.find_spec("rlhf_ray.sample") is None
    if build is None:
        return

    def noted(requests: Sequence[Any], completions: Any, logprobs: Any, **rest: Any) -> Any:
        sampled = rest["weight_version"] >= 0  # else: given answers
        margins = margins_of_last if sampled and len(margins_of_last) == len(requests) else [[] for _ in requests]
        margins_by_sample.update({r.sample_id: row for r, row in zip(requests, margins, strict=True)})
        batch = build(requests, completions, logprobs, **rest)
        if alone:
            truncated = rest["truncated"]
            for request, tokens, logp, cut in zip(requests, completions, logprobs, truncated, strict=True):
                write({
                    "sample": request.sample_id, "prompt_id": request.prompt_id, "version": rest["weight_version"],
                    "start": len(request.token_ids), "tokens": [*request.token_ids, *tokens], "logp": list(logp),
                    "truncated": cut, "margins": margins_by_sample.pop(request.sample_id),
                })  # fmt: skip
        return batch

    module.build_batch = noted


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Held-out prompts are numbered as those of the run are: the prompt itself tells them apart."""
    return row["version"], row["sample"], tuple(row["tokens"][: row["start"]])


@cache
def answers() -> dict[tuple[Any, ...], dict[str, Any]]:
    if not ANSWERS:
        return {}
    with open(ANSWERS, encoding="utf-8") as lines:
        return {key_of(row): row for row in map(json.loads, lines)}


def write(row: dict[str, Any]) -> None:
    with open(f"{OUT}/{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def hook_masks(module: Any) -> None:
    """The one change of numbers that is meant: moments of advantages are summed in float64, so that the order in which
    ranks add up does not show. The house before that rounds its advantages otherwise by 1e-7, and PPO's 320 optimiser
    steps make 1e-4 of it. So it gets the same sums; whatever else differs still shows."""
    whiten = module.masked_whiten
    module.masked_whiten = lambda x_BT, *rest, **named: whiten(x_BT.double(), *rest, **named).to(x_BT.dtype)


# ---- how close a draw was -----------------------------------------------------------------------------------------


def hook_hf(module: Any) -> None:
    """The distance of each uniform number from the nearer end of its token's slice; greedily: of the two best."""
    if not hasattr(module, "KeyedSampler"):
        return
    import torch

    sampler, generate_chunk = module.KeyedSampler, module.HFGenerator._generate_chunk
    draw, columns = sampler.__call__, []

    def drawn(self: Any, input_ids: Any, scores: Any) -> Any:
        p_BV = self.warpers(input_ids, scores.float()).softmax(-1)
        result = draw(self, input_ids, scores)
        token_B1 = result.argmax(-1, keepdim=True)
        best_B2 = p_BV.topk(2).values
        u_B = module.keyed_uniform(self.seed_B, input_ids.shape[1] - self.prompt_length).float()
        cdf_BV = p_BV.cumsum(-1)
        end_B = cdf_BV.gather(-1, token_B1)[:, 0]
        target_B = u_B * cdf_BV[:, -1]
        drawn_B = torch.minimum(end_B - target_B, target_B - (end_B - p_BV.gather(-1, token_B1)[:, 0])).abs()
        columns.append(torch.where(self.greedy_B, best_B2[:, 0] - best_B2[:, 1], drawn_B))
        return result

    def generated(self: Any, requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
        columns.clear()
        return generate_chunk(self, requests, *rest, **named)

    def build(requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
        margins_of_last[:] = torch.stack(columns, 1).tolist()
        return built(requests, *rest, **named)

    built, module.build_batch = module.build_batch, build
    sampler.__call__, module.HFGenerator._generate_chunk = drawn, generated


def hook_vllm_generator(module: Any) -> None:
    """Greedily: the distance of the two best log-probabilities, for which vLLM is asked for both."""
    run = getattr(module.VLLMGenerator, "_run", None)
    if run is None:
        return

    def noted(self: Any, prompts: Any, params: list[Any]) -> list[Any]:
        near_by_seed.clear()
        sampling = [p for p in params if p.prompt_logprobs is None]
        for p in sampling:
            if p.temperature == 0:
                p.logprobs = 2
        outputs = run(self, prompts, params)
        margins_of_last.clear()
        for p, output in zip(sampling, outputs, strict=False):
            if p.temperature == 0:
                steps = [sorted(x.logprob for x in step.values())[-2:] for step in output.outputs[0].logprobs]
                margins_of_last.append([best - second for second, best in steps])
            else:
                margins_of_last.append(near_by_seed[p.seed])
        return outputs

    module.VLLMGenerator._run = noted


def hook_vllm_sampler(module: Any) -> None:
    """On CPU, vLLM adds noise of (seed, token) to the logits and takes the largest. Close: with a logit lower by 1e-5
    the drawn token is not the largest."""
    import torch

    forward_cpu = module.TopKTopPSampler.forward_cpu

    def noted(self: Any, logits: Any, generators: dict[int, Any], k: Any, p: Any) -> Any:
        seed_B = torch.zeros(len(logits), dtype=torch.long)
        for row, generator in generators.items():
            state = generator.get_state()
            seed_B[row] = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long).item()
            generator.set_state(state)
        lowered_BV = module.apply_top_k_top_p(logits.clone(), k, p).float()
        token_B, returned = forward_cpu(self, logits, generators, k, p)
        lowered_BV[torch.arange(len(logits)), token_B.long()] -= CLOSE
        again_B = torch.ops._C.fused_gumbel_argmax(lowered_BV, seed_B)
        for row, generator in generators.items():
            near_by_seed.setdefault(generator.initial_seed(), []).append(float(again_B[row] == token_B[row]))
        return token_B, returned

    module.TopKTopPSampler.forward_cpu = noted


# ---- when a module is imported ------------------------------------------------------------------------------------


class Hooks(importlib.abc.MetaPathFinder):
    """Calls a hook with a module once it has been imported."""

    def __init__(self) -> None:
        self.waiting = {
            "rlhf_ray.sample": hook_sample, "rlhf_ray.roles.batch": hook_batch, "rlhf_ray.batch": hook_batch,
        }  # fmt: skip
        if not os.path.exists(f"{CHECKOUT}/rlhf_ray/sample.py"):
            self.waiting["rlhf_ray.algo.masks"] = hook_masks
        if not ANSWERS:
            self.waiting |= {
                "rlhf_ray.roles.generator_hf": hook_hf, "rlhf_ray.roles.generator_vllm": hook_vllm_generator,
                "vllm.v1.sample.ops.topk_topp_sampler": hook_vllm_sampler,
            }  # fmt: skip

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        hook = self.waiting.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if hook else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_hook(module: Any) -> None:
            if name.startswith("rlhf_ray") and not module.__file__.startswith(CHECKOUT):
                raise ImportError(f"{module.__file__} is not of {CHECKOUT}: this would compare a checkout with itself")
            run(module)
            hook(module)

        spec.loader.exec_module = run_and_hook
        return spec


if OUT:
    sys.meta_path.insert(0, Hooks())
