"""`--dry-run` opens what a run would read: what is missing is refused by name, what is elsewhere is named."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import yaml
from transformers import Qwen2Config

from rlhf_ray.commands.pipeline.stages import describe_pipeline
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.feedback import PairsConfig
from rlhf_ray.config.load import load_config, parse_config
from rlhf_ray.config.reward_server import RewardServerConfig
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.shipped import shipped_config
from rlhf_ray.config.supervised import SCHEMAS
from rlhf_ray.data.rows import read_rows
from rlhf_ray.errors import ConfigError, DataError, ModelError, RlhfRayError
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.start.preflight import MOST_ROWS, limited, preflight

SCRATCH = {"path": "scratch:gpt2", "tokenizer": {"path": "scratch:char"},
           "scratch": {"hidden_size": 8, "layers": 1, "heads": 1, "max_length": 64}}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Ten rows of each kind, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "prompts": [{"prompt": f"say {i}", "answer": str(i)} for i in range(10)],
        "answers": [{"prompt": f"say {i}", "completion": f"now {i}"} for i in range(10)],
        "pairs": [{"prompt": f"say {i}", "chosen": f"now {i}", "rejected": "no"} for i in range(10)],
        "labels": [{"text": f"it is {i}", "label": i % 2} for i in range(10)],
    }
    for name, made in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty_model").mkdir()
    (tmp_path / "mine.py").write_text("def good(completions, **_):\n    return [1.0 for _ in completions]\n")
    return tmp_path


DATA = {"rl": "prompts.jsonl", "sft": "answers.jsonl", "rm": "pairs.jsonl", "dpo": "pairs.jsonl",
        "classifier": "labels.jsonl"}  # fmt: skip


def config_of(command: str, *overrides: str, **settings: object):
    tree = {"model": SCRATCH, "data": {"path": DATA.get(command)}, **settings}
    if command == "rl":
        tree = {"rewards": [{"function": "exact_answer"}], **tree}
        tree["data"] = {"eval_size": 2, "max_prompt_tokens": 16, **tree["data"]}
        tree |= {"rollout": {"max_new_tokens": 8}, "eval": {"size": 2}}
    elif command in SCHEMAS:
        tree["data"] = {"max_length": 64, **tree["data"]}
    path = "run.yaml"
    with open(path, "w") as file:
        yaml.safe_dump(tree, file)
    return load_config(path, overrides, *([] if command == "rl" else [SCHEMAS[command]]))


@pytest.mark.parametrize("command", DATA)
def test_what_is_opened_is_named(command):
    (line,) = preflight(config_of(command))
    assert line.startswith("# opened: ") and DATA[command] in line
    assert ("exact_answer" in line) == (command == "rl")


@pytest.mark.parametrize("command", DATA)
@pytest.mark.parametrize(("override", "error", "expected"), [
    ("data.path=gone.jsonl", DataError, "gone.jsonl: no such file"),
    ("data.path=empty.jsonl", RlhfRayError, "empty.jsonl"),
    ("data.eval_size=500", RlhfRayError, "data.eval_size=500 would hold out all 10"),
    ("data.eval_path=gone_too.jsonl", DataError, "gone_too.jsonl: no such file"),
    ("model={path: ./gone}", ModelError, "./gone: no such folder"),
    ("model={path: ./empty_model}", ModelError, "the folder is empty"),
    ("model.tokenizer.path=./gone", ModelError, "./gone: no such folder"),
])  # fmt: skip
def test_what_is_missing_is_refused_by_name(command, override, error, expected):
    with pytest.raises(error) as refused:
        preflight(config_of(command, override))
    assert expected in str(refused.value)


@pytest.mark.parametrize(("override", "expected"), [
    ("rewards.0.function=exact_anser", "did you mean 'exact_answer'"),
    ("rewards.0.function=mine.py:bad", "bad"),
    ("rewards.0.function=gone.py:good", "gone.py"),
    ("rewards.0.function=no_module:good", "no_module"),
])  # fmt: skip
def test_a_reward_that_is_not_there(override, expected):
    assert "mine.py:good" in preflight(config_of("rl", "rewards.0.function=mine.py:good"))[0]
    with pytest.raises(ConfigError) as refused:
        preflight(config_of("rl", override))
    assert expected in str(refused.value)


@pytest.mark.parametrize(("command", "override"), [
    ("rl", "reward_model={path: ./gone}"), ("rl", "safety={path: ./gone}"), ("dpo", "dpo.reference=./gone"),
    ("sft", "plain_text={data: {path: gone.jsonl, max_length: 64}, share: 0.5}"), ("rm", "eval.test_path=gone.jsonl"),
    ("rl", "sft_data={path: gone.jsonl, max_length: 64}"),
])  # fmt: skip
def test_what_a_command_needs_beside_its_model_and_its_data(command, override):
    with pytest.raises((ModelError, DataError), match="gone"):
        preflight(config_of(command, override, **({"algorithm": {"sft_coef": 0.1}} if "sft_data" in override else {})))


def test_eval_pairs_and_the_reward_server():
    settings = {"data": {"path": "prompts.jsonl"}, "rewards": [{"function": "exact_answer"}]}
    for schema, models in ((EvalRunConfig, {"models": {"a": "./gone"}}), (PairsConfig, {"model": "./gone"})):
        with pytest.raises(ModelError, match="gone"):
            preflight(parse_config({**settings, **models}, schema, source="here"))
        with pytest.raises(DataError, match="absent"):
            preflight(parse_config({**settings, **models, "data": {"path": "absent.jsonl"}}, schema, source="here"),
                      unmade=Path("gone"))  # fmt: skip
    with pytest.raises(ModelError, match="gone"):
        preflight(parse_config({"reward_model": {"path": "./gone"}}, RewardServerConfig, source="here"))


@pytest.mark.parametrize("command", ["rl", "eval", "pairs"])
def test_a_model_that_vllm_would_refuse_when_it_has_started(command, here, monkeypatch):
    """Nobody has installed vLLM here, and the folder's weights are not even there."""
    monkeypatch.setattr("rlhf_ray.config.extras.find_spec", lambda name: object())
    build_tokenizer("char", ["say now 0123456789"], max_length=64).save_pretrained(here / "narrow")
    Qwen2Config(vocab_size=64, hidden_size=48, num_attention_heads=3, num_key_value_heads=3).save_pretrained(
        here / "narrow"
    )
    settings = {"data": {"path": "prompts.jsonl", "max_prompt_tokens": 16}, "rewards": [{"function": "exact_answer"}],
                "generator": {"engine": "vllm"}, "device": "cpu"}  # fmt: skip
    if command == "rl":
        config = config_of("rl", "model={path: ./narrow}", "generator.engine=vllm", "device=cpu")
    elif command == "eval":
        config = parse_config({**settings, "models": {"one": "./narrow"}}, EvalRunConfig, source="the test")
    else:
        config = parse_config({**settings, "model": "./narrow"}, PairsConfig, source="the test")
    with pytest.raises(ModelError, match=r"vLLM on CPU cannot serve ./narrow: its attention heads have size 16"):
        preflight(config)


def test_nothing_is_downloaded():
    lines = preflight(config_of("rl", "model={path: nobody/nothing}"))
    assert lines == ["# opened: prompts.jsonl, exact_answer",
                     "# not opened: nobody/nothing (on the Hub, and a dry run downloads nothing)"]  # fmt: skip
    lines = preflight(config_of("sft", "data.path=nobody/rows"))
    assert lines == ["# not opened: nobody/rows (on the Hub, and a dry run downloads nothing)"]
    with pytest.raises(ConfigError, match="data.eval_size=10 would hold out all 10 rows of prompts.jsonl"):
        preflight(config_of("rl", "model={path: nobody/nothing}", "data.eval_size=10"))


def test_a_mistyped_folder_is_not_taken_for_the_hub_in_silence(here):
    (here / "runs" / "first").mkdir(parents=True)
    assert preflight(config_of("rl", "model={path: runs/frist}"))[1] == (
        "# not opened: runs/frist (not in the folder runs (did you mean runs/first?); on the Hub, if anywhere, and a "
        "dry run downloads nothing)"
    )


def test_of_a_large_dataset_only_the_first_rows_are_read(here, monkeypatch):
    (here / "many.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(MOST_ROWS + 500)))
    read = []
    monkeypatch.setattr(
        "rlhf_ray.data.prompts.read_rows",
        lambda *args, **options: islice((read.append(row.where) or row for row in read_rows(*args, **options)), None),
    )
    config = config_of("rl", "data.path=many.jsonl", "model.tokenizer.alphabet=' 0123456789asy'")
    preflight(config)
    assert 0 < len(read) <= MOST_ROWS + 1
    assert limited(config).data.limit == MOST_ROWS
    assert limited(config_of("rl", "data.path=many.jsonl", "data.eval_size=1500")).data.limit == 3000
    assert limited(config_of("rl", "data.limit=7")).data.limit == 7
    beside = config_of("rl", "algorithm.sft_coef=0.1", "sft_data={path: answers.jsonl, max_length: 64}")
    assert limited(beside).sft_data.limit == MOST_ROWS
    assert "answers.jsonl" in preflight(beside)[0]


def test_a_pipeline_opens_what_no_stage_has_yet_to_make(here):
    stages = [
        {"name": "sft", "run": "sft", "set": {"model": SCRATCH, "data": {"path": "answers.jsonl", "max_length": 64}}},
        {"name": "dpo", "run": "dpo", "set": {"model.path": "${sft.model}", "data.path": "${pairs}"}},
    ]
    (here / "line.yaml").write_text(yaml.safe_dump({"values": {"pairs": "pairs.jsonl"}, "stages": stages}))
    text = describe_pipeline("line.yaml")
    assert "# opened: answers.jsonl\n" in text and "# opened: pairs.jsonl\n" in text
    assert "# not opened: RUN/sft/model (made by an earlier stage)" in text
    for override, expected in (("values.pairs=gone.jsonl", "gone.jsonl: no such file"),
                               ("values.pairs=empty.jsonl", "empty.jsonl: the file has no rows")):  # fmt: skip
        with pytest.raises(DataError, match=expected):
            describe_pipeline("line.yaml", [override])


def test_a_package_that_a_later_stage_needs(here, monkeypatch):
    stages = [
        {"name": "sft", "run": "sft", "set": {"model": SCRATCH, "data": {"path": "answers.jsonl", "max_length": 64}}},
        {"name": "rl", "run": "rl", "set": {"model.path": "${sft.model}", "data.path": "prompts.jsonl",
                                            "rewards": [{"function": "math"}]}},
    ]  # fmt: skip
    (here / "line.yaml").write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.setattr("rlhf_ray.config.extras.find_spec", lambda name: None if name == "math_verify" else True)
    with pytest.raises(ConfigError, match=r"not installed: math_verify \(for the reward math\)"):
        describe_pipeline("line.yaml")


def test_the_quickstart_can_be_checked():
    assert preflight(load_config(shipped_config("grpo_arithmetic.yaml"))) == ["# opened: exact_answer"]


def test_observers_are_found_before_the_run(tmp_path, tiny_tree):
    (tmp_path / "watch.py").write_text("def told(record): ...\n")
    tiny_tree["logging"] = {"loggers": [], "observers": [f"{tmp_path}/watch.py:told"]}
    assert preflight(RunConfig.model_validate(tiny_tree)) == [f"# opened: repetition_penalty, {tmp_path}/watch.py:told"]
    tiny_tree["logging"]["observers"] = [f"{tmp_path}/watch.py:tolld"]
    with pytest.raises(ConfigError, match="observer .*watch.py has no 'tolld'; did you mean 'told'"):
        preflight(RunConfig.model_validate(tiny_tree))


def test_a_loss_and_an_advantage_of_ones_own_are_tried_before_the_run(tmp_path, tiny_tree):
    (tmp_path / "own.py").write_text(
        "def loss(logp_BT, old_BT, adv_BT, mask_BT, *, clip_low, beta=1.0): return -beta * logp_BT * adv_BT\n"
        "def advantage(reward_B, group_B): return reward_B - 0.5\n"
        "def wrong(reward_B, group_B): return 0.5\n"
    )
    own = {"policy_loss": f"{tmp_path}/own.py:loss", "advantage": f"{tmp_path}/own.py:advantage"}
    tiny_tree["algorithm"] = {**own, "policy_loss_args": {"beta": 2.0}}
    assert preflight(RunConfig.model_validate(tiny_tree)) == [
        f"# opened: repetition_penalty, {own['policy_loss']} as loss(logp_BT, old_BT, adv_BT, mask_BT, clip_low=0.2, "
        f"beta=2.0), {own['advantage']} as advantage(reward_B, group_B)"
    ]
    tiny_tree["generator"] = {"engine": f"{tmp_path}/own.py:engine"}
    with pytest.raises(ConfigError, match="engine .*own.py has no 'engine'; check the spelling"):
        preflight(RunConfig.model_validate(tiny_tree))
    tiny_tree["generator"] = {"engine": "hff"}
    with pytest.raises(ValueError, match="'hff' is unknown: did you mean 'hf'.* Your own: module:function"):
        RunConfig.model_validate(tiny_tree)
    del tiny_tree["generator"]
    tiny_tree["algorithm"] = {"advantage": f"{tmp_path}/own.py:wrong"}
    with pytest.raises(ConfigError, match=r"the advantage is a float; return a tensor of shape \[4\]"):
        preflight(RunConfig.model_validate(tiny_tree))
