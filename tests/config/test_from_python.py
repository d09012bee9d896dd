"""Settings from a Python program: the checks of a file, and objects in the place of names."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.from_python import config_of
from rlhf_ray.config.given import GivenFunction, GivenModel, GivenRows
from rlhf_ray.config.load import dump_config, load_config, validated
from rlhf_ray.config.schema import LearnerConfig, RolloutConfig, RunConfig
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.data.rows import read_rows
from rlhf_ray.errors import ConfigError, DataError

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]


class Model:
    def __call__(self): ...
    def save_pretrained(self, folder): ...


class Tokenizer(Model):
    def convert_ids_to_tokens(self): ...


@pytest.fixture
def file(tmp_path, tiny_tree) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return path


def test_a_file_a_mapping_and_an_object_give_the_same_config(file, tiny_tree):
    loaded = load_config(file)
    for source in (file, str(file), tiny_tree, loaded):
        assert config_of(source, RunConfig, {}) == loaded


def test_settings_go_over_it_one_by_one(file):
    settings = {"steps": 7, "learner": {"lr": 1e-3}, "rollout.max_new_tokens": 3, "rewards.0.weight": 2.0}
    config = config_of(file, RunConfig, settings)
    dotted = ["steps=7", "learner.lr=1e-3", "rollout.max_new_tokens=3", "rewards.0.weight=2.0"]
    assert config == load_config(file, dotted)
    assert config.rollout.group_size == 2, "the other settings of a section stay"


def test_a_section_object_changes_only_what_it_was_given(file):
    config = config_of(file, RunConfig, {"rollout": RolloutConfig(top_k=5), "learner": LearnerConfig(lr=1e-3)})
    assert (config.rollout.top_k, config.rollout.group_size, config.learner.lr) == (5, 2, 1e-3)


def test_the_mapping_that_was_given_stays_as_it_is(tiny_tree):
    before = yaml.safe_dump(tiny_tree)
    config_of(tiny_tree, RunConfig, {"learner": {"lr": 1e-3}, "rollout.top_k": 5})
    assert yaml.safe_dump(tiny_tree) == before


@pytest.mark.parametrize(
    "settings", [{"algorithm": {"name": "ppo"}}, {"algorithm.name": "ppo"}], ids=["section", "dotted"]
)
def test_another_algorithm_brings_its_own_preset(file, settings):
    # 2 prompts a step cannot be cut into ppo's 4 minibatches.
    resolved = config_of(file, RunConfig, {})
    whole = RunConfig.model_validate(resolved.model_dump())
    config = config_of(whole, RunConfig, {**settings, "rollout.prompts_per_step": 4})
    assert (config.algorithm.advantage, config.learner.epochs, config.learner.minibatches) == ("gae", 4, 4)


def test_everything_wrong_is_said_at_once(tiny_tree):
    with pytest.raises(ConfigError) as error:
        config_of(tiny_tree, RunConfig, {"step": 3, "rollout.group_size": 1, "learner": {"lr": -1}})
    said = str(error.value)
    assert "step: unknown key; did you mean steps?" in said
    assert "learner.lr: input should be greater than 0" in said
    assert "group_size=1" in said, "and what contradicts each other"


@pytest.mark.parametrize(("change", "said"), [
    ({"steps": -3}, "steps: input should be greater than 0"),
    ({"steps": True}, "steps: input should be a number"),
    ({"rollout": RolloutConfig(prompts_per_step=2, group_size=1, max_new_tokens=2)}, "group_size=1"),
    ({"stepz": 3}, "stepz: unknown key"),
], ids=["bound", "type", "contradiction", "unknown"])  # fmt: skip
def test_a_config_made_in_python_is_checked_as_a_file_is(tiny_tree, change, said):
    config = RunConfig(**tiny_tree).model_copy(update=change)
    with pytest.raises(ConfigError, match=said):
        validated(config)
    with pytest.raises(ConfigError, match=said):
        config_of(config, RunConfig, {})


def test_a_valid_config_is_not_changed_by_the_check(tiny_tree):
    config = load_config_of(tiny_tree, rewards=[len], data=ROWS)
    again = validated(config)
    assert again == config
    assert again.rewards[0].function.value is len and again.data.path.value is ROWS


def load_config_of(tree, rewards, data):
    return config_of(tree, RunConfig, {"rewards": [{"function": f} for f in rewards], "data.path": data})


def test_the_wrong_kind_of_config_is_refused(tiny_tree):
    with pytest.raises(ConfigError, match="the config is a RunConfig, and this needs a SFTConfig"):
        config_of(RunConfig(**tiny_tree), SFTConfig, {})
    with pytest.raises(ConfigError, match="the config is a int"):
        config_of(3, RunConfig, {})


def test_objects_stand_for_texts_and_are_written_as_names(tiny_tree):
    def score(completions):
        return [1.0] * len(completions)

    model = Model()
    settings = {"model.path": model, "model.tokenizer.path": Tokenizer(), "data.eval_path": {"test": ROWS}}
    config = config_of(load_config_of(tiny_tree, [score, lambda completions: [0.0]], ROWS), RunConfig, settings)
    assert [reward.label for reward in config.rewards] == ["score", "lambda"]
    assert isinstance(config.rewards[0].function, GivenFunction) and config.rewards[0].function.value is score
    assert isinstance(config.data.path, GivenRows) and config.data.path.value is ROWS
    assert isinstance(config.model.path, GivenModel) and config.model.path.value is model
    written = yaml.safe_load(dump_config(config))
    assert [reward["function"] for reward in written["rewards"]] == ["python:score", "python:lambda"]
    assert (written["data"]["path"], written["model"]["path"]) == ("python:rows", "python:Model")
    assert written["model"]["tokenizer"]["path"] == "python:Tokenizer"


def test_only_functions_travel_with_a_pickled_config(tiny_tree):
    config = load_config_of(tiny_tree, [len], ROWS)
    sent = pickle.loads(pickle.dumps(config))
    assert sent == config and sent.rewards[0].function.value is len
    assert type(sent.data.path) is str, "each worker of a cluster would get all rows"


def test_a_model_needs_its_tokenizer_and_a_function_no_process(tiny_tree):
    del tiny_tree["model"]["tokenizer"]
    config = {**tiny_tree, "rewards": [{"function": len, "isolated": True}]}
    with pytest.raises(ConfigError) as error:
        config_of(config, RunConfig, {"model.path": Model()})
    assert "brings no tokenizer; give that too" in str(error.value)
    assert "rewards.0.isolated: another process could not import len" in str(error.value)


@pytest.mark.parametrize(("path", "said"), [
    ([1, 2], "data.path: input should be a valid string"),
    (type("DataFrame", (), {"to_dict": None, "__len__": None, "__iter__": None, "__getitem__": {}.__getitem__})(),
     r"a table of DataFrame is no list of rows; give df.to_dict\('records'\)"),
], ids=["numbers", "table"])  # fmt: skip
def test_what_are_no_rows_is_refused(tiny_tree, path, said):
    with pytest.raises(ConfigError, match=said):
        config_of(tiny_tree, RunConfig, {"data.path": path})


def test_rows_are_read_with_their_places():
    given = GivenRows("python:rows", [*ROWS, 3])
    rows, bad = [], []
    for row in read_rows(given, on_bad=bad.append):
        rows.append((row.where, row.fields))
    assert rows == [("rows[0]", ROWS[0]), ("rows[1]", ROWS[1])]
    assert [str(error) for error in bad] == ["rows[2]: a int, not a mapping; give each row as a dict"]
    assert rows[0][1] is not ROWS[0], "a reader may change its row"


def test_rows_by_split():
    given = GivenRows("python:rows", {"train": ROWS[:1], "test": ROWS[1:]})
    assert [row.fields for row in read_rows(given, split="test")] == ROWS[1:]
    with pytest.raises(DataError, match="there is no 'dev' among 'train', 'test'"):
        list(read_rows(given, split="dev"))


def test_a_name_without_its_object_says_what_to_do():
    with pytest.raises(DataError, match="given from Python are in no file; give them again"):
        list(read_rows("python:rows"))
