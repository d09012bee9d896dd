"""vLLM as a service against its own `LLM.generate`: tokens a second of the same answers, in turns, in one process.

    python benchmarks/service.py [--rounds 7]

The service (`VLLMGenerator.submit` and `collect`) returns answers one by one as they end, as samples with the version
of the weights a token; `LLM.generate` returns all at the end, in vLLM's own objects. A line is one shape: processor
seconds of this process, which a busy neighbour does not stretch, and the ratio of each pair of turns.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable

from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.roles import vllm_engine
from rlhf_ray.roles.generator_vllm import VLLMGenerator
from rlhf_ray.roles.protocols import Request, Sampling

MODELS = {"0.6M": (128, 3), "11M": (384, 6)}  # hidden size, layers
SHAPES = ((64, 8, 64), (256, 8, 128), (32, 512, 64))  # answers, prompt tokens, tokens of an answer
VOCAB, STOP = 1000, 1


def requests_of(count: int, prompt: int) -> list[Request]:
    dice = random.Random(0)
    prompts = [tuple(dice.choices(range(2, VOCAB), k=prompt)) for _ in range(-(-count // 8))]
    return [Request(i // 8, i, prompts[i // 8], seed=i) for i in range(count)]


def with_service(generator: VLLMGenerator, requests: list[Request], sampling: Sampling) -> int:
    """Tokens that were written."""
    generator.submit(requests, sampling)
    tokens = 0
    while generator.open:
        tokens += sum(sample.written for sample in generator.collect())
    return tokens


def with_generate(generator: VLLMGenerator, requests: list[Request], sampling: Sampling) -> int:
    """Tokens that were written."""
    parameters = [vllm_engine.writing(sampling, request.seed, sampling.temperature) for request in requests]
    prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
    outputs = generator._llm.generate(prompts, parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def tokens_a_second(run: Callable[..., int], *arguments: object) -> float:
    gc.collect()
    started = time.process_time()
    tokens = run(*arguments)
    return tokens / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print("model | answers, prompt + answer tokens | LLM.generate | service | ratio (lowest, highest)")
    for name, (hidden, layers) in MODELS.items():
        model = build_scratch("qwen2", vocab_size=VOCAB, hidden_size=hidden, layers=layers, heads=4, max_length=1024)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            generator = VLLMGenerator(folder, max_model_len=1024)
            for count, prompt, answer in SHAPES:
                job = generator, requests_of(count, prompt), Sampling(answer, stop_token_ids=(STOP,))
                assert with_service(*job) == with_generate(*job)  # also the warm-up
                turns = [
                    [tokens_a_second(run, *job) for run in (with_generate, with_service)] for _ in range(rounds)
                ]
                one, other = (statistics.median(column) for column in zip(*turns, strict=True))
                ratios = sorted(service / whole for whole, service in turns)
                shape = f"{count}, {prompt} + {answer}"
                print(
                    f"{name:>5} | {shape:>15} | {one:8.0f} | {other:8.0f} | {statistics.median(ratios):.3f} "
                    f"({ratios[0]:.3f}, {ratios[-1]:.3f})",
                    flush=True,
                )
            generator.close()


if __name__ == "__main__":
    main()
