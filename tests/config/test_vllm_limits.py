"""What vLLM cannot serve is refused from the settings alone, before anything starts."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_ray.config.load import parse_config
from rlhf_ray.config.schema import GeneratorConfig, RunConfig
from rlhf_ray.config.vllm_limits import CPU_HEAD_SIZES, Shape, generator_problems, shape_problems


def config(kind: str = "qwen2", scratch: dict | None = None, generator: dict | None = None, **settings) -> RunConfig:
    tree = {
        "executor": "ray",
        "model": {"path": f"scratch:{kind}", "tokenizer": {"path": "scratch:char"},
                  "scratch": {"hidden_size": 64, "heads": 2, "layers": 2, "max_length": 32, **(scratch or {})}},
        "data": {"path": "task:arithmetic", "max_prompt_tokens": 16},
        "rollout": {"max_new_tokens": 16},
        "rewards": [{"function": "exact_answer"}],
        **settings,
    }  # fmt: skip
    made = parse_config(tree, RunConfig, source="the test")
    # What is loaded may not contradict itself; here it does.
    return made.model_copy(update={"generator": GeneratorConfig(engine="vllm", **(generator or {}))})


def test_head_sizes_are_those_of_vllm():
    """Read from its source: importing vLLM takes half a minute."""
    found = find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    source = Path(next(iter(found.submodule_search_locations)), "v1/attention/backends/cpu_attn.py").read_text()
    (method,) = (
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes"
    )  # fmt: skip
    assert ast.literal_eval(method.body[-1].value) == list(CPU_HEAD_SIZES)


def test_the_heads_of_a_scratch_model_are_too_narrow_for_the_cpu():
    (problem,) = generator_problems(config(scratch={"heads": 4}), "cpu")
    assert problem.startswith("vLLM on CPU cannot serve scratch:qwen2: its attention heads have size 16, and the ker")
    assert "32, 64, 80" in problem and "choose model.scratch.hidden_size and model.scratch.heads accord" in problem
    assert problem.endswith("or set generator.engine=hf")
    assert generator_problems(config(), "cpu") == []
    for device in ("cuda", "auto"):
        assert generator_problems(config(scratch={"heads": 4}), device) == [], "only the CPU's kernels are choosy"


def test_such_a_config_is_refused_when_it_is_loaded():
    tree = config(device="cpu", scratch={"heads": 4}).model_dump(mode="json")
    with pytest.raises(Exception, match="vLLM on CPU cannot serve scratch:qwen2: its attention heads have size 16"):
        parse_config(tree, RunConfig, source="the test")


def test_every_gpu_gets_as_many_heads():
    found = generator_problems(config("gpt2", {"hidden_size": 96, "heads": 3}, {"tensor_parallel": 2}), "cuda")
    assert [problem.partition(", and")[0] for problem in found] == [
        "generator.tensor_parallel=2 does not divide the 3 attention heads of scratch:gpt2",
        "generator.tensor_parallel=2 does not divide the 3 key and value heads of scratch:gpt2",
    ]
    assert all("set it to a divisor" in problem for problem in found)
    assert generator_problems(config("gpt2", {"hidden_size": 96, "heads": 3}, {"tensor_parallel": 3}), "cuda") == []


@pytest.mark.parametrize(("kv_heads", "parts", "fits"), [(2, 4, True), (4, 2, True), (3, 2, False), (2, 3, False)])
def test_few_key_heads_are_repeated(kv_heads, parts, fits):
    """Qwen2.5-0.5B has 2 of them: on 4 GPUs each is held twice, but on 3 it cannot be shared out."""
    shape = Shape(heads=12, kv_heads=kv_heads)
    generator = GeneratorConfig(engine="vllm", tensor_parallel=parts)
    found = shape_problems("m", shape, generator, "cuda", longest=1, bfloat16=True, instead="no")
    assert (found == []) is fits and all(f"the {kv_heads} key and value heads" in problem for problem in found)


def test_the_mlp_is_cut_too():
    generator = GeneratorConfig(engine="vllm", tensor_parallel=2)
    (found,) = shape_problems("m", Shape(2, mlp=129), generator, "cuda", longest=1, bfloat16=True, instead="no")
    assert found.startswith("generator.tensor_parallel=2 does not divide the MLP width 129 of m")


def test_the_cache_holds_a_sequence():
    """2 layers with 8 heads of 128: 2 * 2 * 8 * 128 * 4 bytes = 16 KiB a token, so 1 GiB holds 2**16 of them."""
    shape = Shape(heads=8, head_size=128, kv_heads=8, layers=2)

    def problems(longest: int, bfloat16: bool = False, device: str = "cpu") -> list[str]:
        generator = GeneratorConfig(engine="vllm", kv_cache_gb=1)
        return shape_problems("m", shape, generator, device, longest=longest, bfloat16=bfloat16, instead="no")

    assert problems(2**16) == [] and problems(2**17, bfloat16=True) == [] and problems(2**20, device="cuda") == []
    (found,) = problems(2**17)
    assert found.startswith("generator.kv_cache_gb=1 does not hold one sequence: 131072 tokens of m have 2 GiB")


def test_settings_that_the_run_makes_itself():
    given = {"seed": 1, "dtype": "half", "max_num_seqs": 8}
    (found,) = generator_problems(config(generator={"engine_args": given}), "cuda")
    assert found.startswith("generator.engine_args: dtype, seed is set by the run itself; drop it")


def test_tensor_parallel_in_one_process():
    (found,) = generator_problems(config(generator={"tensor_parallel": 2}, executor="local"), "cuda")
    assert found.startswith("generator.tensor_parallel=2 with executor=local") and "set executor=ray" in found


def test_other_engines_and_models_are_not_asked():
    made = config(scratch={"heads": 4})
    hf = made.model_copy(update={"generator": GeneratorConfig(engine="hf")})
    assert generator_problems(hf, "cpu") == [] == generator_problems(config("lstm"), "cpu")
