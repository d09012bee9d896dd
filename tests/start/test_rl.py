"""From a config to a run: bad input is refused with a remedy, and leaves nothing that a second attempt trips over."""

import errno
import json
import shutil
import warnings
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from rlhf_ray.config.load import load_config
from rlhf_ray.errors import ConfigError, DataError, ModelError, RlhfRayError, StorageError
from rlhf_ray.models.devices import Hardware
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import build_tokenizer
from rlhf_ray.roles import factory
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.start import hardware, rl_inputs, warm_start
from rlhf_ray.start.rl import run_rl
from rlhf_ray.start.rl_inputs import left_out, load_data


@pytest.fixture
def config(tmp_path, tiny_tree):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture
def data(tmp_path):
    def write(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def model_folder(tmp_path):
    """A policy with its tokenizer."""
    folder, tokenizer = tmp_path / "policy", build_tokenizer("char", ["abcdefghij 0123456789+="], max_length=32)
    build_scratch("qwen2", vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


GOOD = [{"prompt": f"say {word}"} for word in ("abc", "def", "ghi", "jkl", "mno")]


# ---- bad input ------------------------------------------------------------------------------------------------


def refused(config, run_dir, kind, message) -> None:
    """The run ends with `message`, and its folder is not there: the same command may be given again."""
    with pytest.raises(kind, match=message) as error:
        run_rl(config, run_dir)
    assert isinstance(error.value, RlhfRayError)
    assert not run_dir.exists()


def test_a_missing_file(config, tmp_path):
    message = "nowhere.jsonl: no such file; .*give an existing"
    refused(config("data.path=nowhere.jsonl"), tmp_path / "run", DataError, message)


def test_a_broken_line(config, tmp_path, data):
    path = data(GOOD[0], GOOD[1], '{"prompt": "say', GOOD[2])
    refused(config(f"data.path={path}", "data.field=prompt"), tmp_path / "run", DataError, "data.jsonl:3: broken JSON")


def test_an_empty_prompt(config, tmp_path, data):
    path = data(GOOD[0], {"prompt": "  "}, *GOOD[1:])
    message = "data.jsonl:2: field 'prompt' is empty; remove the row, or fill it"
    refused(config(f"data.path={path}", "data.field=prompt"), tmp_path / "run", DataError, message)


def test_a_prompt_over_the_limit(config, tmp_path, data, capsys):
    path = data(*GOOD, {"prompt": "say " * 10})
    message = "data.jsonl:6: the prompt has 40 tokens, the limit is 16; raise data.max_prompt_tokens"
    refused(config(f"data.path={path}", "data.field=prompt"), tmp_path / "run", DataError, message)
    dropped = config(f"data.path={path}", "data.field=prompt", "data.overlong_prompts=drop")
    assert run_rl(dropped, tmp_path / "run")["status"] == "finished"
    assert f"{path}: prompts left out: 1 longer than max_prompt_tokens\n" in capsys.readouterr().out


@pytest.mark.slow
def test_fewer_held_out_prompts_than_asked_for_are_told(config, tmp_path, data, capsys):
    other = data(*GOOD[:3], name="held.jsonl")
    settings = (f"data.path={data(*GOOD)}", "data.field=prompt", f"data.eval_path={other}")
    run_rl(config(*settings, "eval.size=4"), tmp_path / "less")
    assert "held out: 3 prompts; there are no more, and eval.size=4\n" in capsys.readouterr().out
    run_rl(config(*settings, "eval.size=3"), tmp_path / "all")
    assert "held out:" not in capsys.readouterr().out


def test_a_model_folder_without_a_tokenizer(config, tmp_path, model_folder):
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    settings = config(f"model.path={model_folder}", "model.tokenizer.path=null")
    refused(settings, tmp_path / "run", ModelError, "the folder has no tokenizer .*tokenizer.save_pretrained")


def test_a_tokenizer_without_an_end(config, tmp_path, monkeypatch):
    real = rl_inputs.make_tokenizer

    def endless(settings):
        tokenizer = real(settings)
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(rl_inputs, "make_tokenizer", endless)
    message = "scratch:char: the tokenizer has no EOS token, so no completion could end; set eos_token"
    refused(config(), tmp_path / "run", ModelError, message)


def test_a_tokenizer_of_another_model(config, tmp_path, model_folder, data):
    build_tokenizer("char", [chr(c) for c in range(32, 127)]).save_pretrained(tmp_path / "other")
    tokenizer = f"model.tokenizer.path={tmp_path}/other"
    settings = config(f"model.path={model_folder}", tokenizer, f"data.path={data(*GOOD)}")
    message = r"token \d+ \('.'\) is beyond the 26 embeddings of .*set model.tokenizer.path to the right one"
    refused(settings, tmp_path / "run", ModelError, message)


def test_a_quantised_model_folder(config, tmp_path, model_folder, data):
    shape = json.loads((model_folder / "config.json").read_text())
    shape["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model_folder / "config.json").write_text(json.dumps(shape))
    settings = config(f"model.path={model_folder}", "model.tokenizer.path=null", f"data.path={data(*GOOD)}")
    message = "policy holds packed .quantised. weights.* full-precision model, .*set model.lora.quantize=nf4"
    refused(settings, tmp_path / "run", ModelError, message)


def test_no_model_folder(config, tmp_path):
    settings = config(f"model.path={tmp_path}/none", "model.tokenizer.path=null")
    refused(settings, tmp_path / "run", ModelError, "no such folder; give an existing model folder")


def test_chat_data_without_a_template(config, tmp_path, data, model_folder):
    path = data(*[{"messages": [{"role": "user", "content": "abc"}]}] * 5)
    settings = config(f"data.path={path}", f"model.path={model_folder}", "model.tokenizer.path=null")
    refused(settings, tmp_path / "run", DataError, "data.jsonl:1: .*no chat template; use an instruction-tuned model")


def test_prompt_and_completion_beyond_the_models_positions(config, tmp_path, data):
    folder, tokenizer = tmp_path / "gpt2", build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz "])
    build_scratch("gpt2", vocab_size=30, hidden_size=16, layers=1, heads=2, max_length=10).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = [f"data.path={data(*GOOD)}", f"model.path={folder}", "model.tokenizer.path=null"]
    message = "longest prompt has 7 tokens, and with rollout.max_new_tokens=4 .* the 10 positions of .*lower rollout"
    refused(config(*settings, "rollout.max_new_tokens=4"), tmp_path / "run", ConfigError, message)
    assert run_rl(config(*settings, "rollout.max_new_tokens=3"), tmp_path / "run")["status"] == "finished"


def test_a_critic_that_cannot_read_what_the_policy_writes(config, tmp_path, model_folder, data):
    small = tmp_path / "small"
    build_scratch("gpt2", vocab_size=8, hidden_size=8, layers=1, heads=2, max_length=16).save_pretrained(small)
    ppo = ("algorithm.name=ppo", f"model.path={model_folder}", "model.tokenizer.path=null", f"data.path={data(*GOOD)}")
    refused(config(*ppo, f"critic.path={small}"), tmp_path / "run", ModelError, "small has 8 embeddings, and the")
    refused(config(*ppo, f"critic.path={small}", "rollout.max_new_tokens=12"), tmp_path / "run", ConfigError,
            "more than the 16 positions of .*small")  # fmt: skip
    refused(config(*ppo, "critic.path=./gone"), tmp_path / "run", ModelError, "gone: no such folder")


def test_an_unknown_reward(config, tmp_path):
    refused(config("rewards.0.function=exact_anser"), tmp_path / "run", ConfigError, "did you mean 'exact_answer'")
    refused(config("rewards.0.function=gone.py:f"), tmp_path / "run", ConfigError, "reward file gone.py does not exist")


def test_a_reward_model_folder_without_a_model_is_found_before_the_warm_start(config, tmp_path, model_folder):
    judge = tmp_path / "judge"
    shutil.copytree(model_folder, judge)
    (judge / "config.json").unlink()
    refused(config(f"reward_model.path={judge}"), tmp_path / "run", ModelError, "judge: the folder has no config.json")


def test_a_reward_model_that_is_not_there(config, tmp_path):
    settings = config(f"reward_model.path={tmp_path}/judge")
    refused(settings, tmp_path / "run", ModelError, "judge: no such folder")


def test_too_little_data_to_hold_some_out(config, tmp_path, data):
    settings = config(f"data.path={data(*GOOD)}", "data.field=prompt", "data.eval_size=5")
    refused(settings, tmp_path / "run", ConfigError, "data.eval_size=5 would hold out all 5 prompts .*lower it")


def test_a_device_that_does_not_fit(config, tmp_path, monkeypatch):
    settings = config("learner.engine=deepspeed", "device=auto")
    monkeypatch.setattr(hardware, "choose_hardware", lambda *_: Hardware("mps", None))
    refused(settings, tmp_path / "run", ConfigError, "mps here, .* 1 problem\n.*learner.engine=deepspeed has no MPS")


def test_bad_input_comes_before_the_warm_start(config, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: pytest.fail("minutes of training before a typo is found"))
    for override in ("data.eval_path=gone.jsonl", "rewards.0.function=nothing", "reward_model.path=./gone"):
        with pytest.raises(RlhfRayError):
            run_rl(config("warm_start.steps=5", override), tmp_path / "run")


def test_a_folder_that_was_there_before_stays(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run_rl(config(), tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# ---- failures later on ----------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Checkpoints find no space."""

    def save(self, step, *args):
        raise StorageError(errno.ENOSPC, "checkpoints: the disk is full; free some space")

    monkeypatch.setattr(Checkpoints, "save", save)


def test_no_space_for_a_checkpoint(config, tmp_path, full_disk):
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        run_rl(config(), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "the disk is full" in summary["error"]


@pytest.mark.parametrize("folder", ["start", "model"])
def test_no_space_for_a_model(config, tmp_path, monkeypatch, folder):
    """safetensors has an error of its own for it."""
    save = PreTrainedModel.save_pretrained

    def write(self, to, *args, **kwargs):
        if Path(to).name.startswith(folder):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(self, to, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", write)
    with pytest.raises(StorageError, match=f"{folder}: cannot write the .*: the disk is full; free some space"):
        run_rl(config(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_no_space_even_for_the_summary(config, tmp_path, full_disk, monkeypatch):
    from rlhf_ray.run.directory import RunDirectory

    def write_summary(self, summary):
        raise StorageError(errno.ENOSPC, "summary.json: the disk is full")

    monkeypatch.setattr(RunDirectory, "write_summary", write_summary)
    first_error = pytest.raises(StorageError, match="checkpoints: the disk is full")
    with pytest.warns(UserWarning, match="the end of the run could not be written down"), first_error:
        run_rl(config(), tmp_path / "run")


@pytest.fixture
def failing_start(monkeypatch):
    """Fails after the warm start and before the first step, until it is mended."""
    real = factory.make_learner

    def fail(*args):
        raise ModelError("the learner does not fit; use a smaller one")

    monkeypatch.setattr(factory, "make_learner", fail)
    return lambda: monkeypatch.setattr(factory, "make_learner", real)


@pytest.mark.slow
def test_a_second_attempt_in_the_same_folder(config, tmp_path, failing_start):
    run = tmp_path / "run"
    with pytest.raises(ModelError):
        run_rl(config("warm_start.steps=1", "warm_start.max_length=32"), run)
    assert (run / "start" / "model.safetensors").is_file() and (run / "summary.json").is_file()
    (run / "notes.txt").write_text("mine")
    failing_start()
    # Another model: what the first attempt made must not be used.
    assert run_rl(config("model.scratch.layers=2"), run)["status"] == "finished"
    assert json.loads((run / "start" / "config.json").read_text())["num_hidden_layers"] == 2
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_going_on_keeps_what_the_first_attempt_made(config, tmp_path, failing_start, monkeypatch):
    run, settings = tmp_path / "run", config("warm_start.steps=1", "warm_start.max_length=32")
    with pytest.raises(ModelError):
        run_rl(settings, run)
    failing_start()
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: pytest.fail("the warm start was done"))
    assert run_rl(settings, run, resume=True)["status"] == "finished"


def test_a_run_that_has_begun_is_not_overwritten(config, tmp_path):
    run_rl(config(), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run"):
        run_rl(config(), tmp_path / "run")


@pytest.mark.slow
def test_resume_does_not_take_a_failed_start_for_the_newest_run(config, tmp_path, failing_start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failing_start()
    first = run_rl(config())
    assert first["run_dir"].startswith("runs/tiny-")
    monkeypatch.setattr(factory, "make_learner", None)
    with pytest.raises(TypeError):
        run_rl(config())
    failing_start()
    assert run_rl(config("steps=2"), resume=True)["run_dir"] == first["run_dir"]


@pytest.mark.slow
def test_a_half_written_policy_is_made_anew(config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = warm_start.build_scratch
    monkeypatch.setattr(warm_start, "build_scratch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_rl(config(), run)
    (run / "start.unfinished").mkdir()
    (run / "start.unfinished" / "model.safetensors").write_text("half")
    monkeypatch.setattr(warm_start, "build_scratch", real)
    assert run_rl(config(), run)["status"] == "finished"
    assert not (run / "start.unfinished").exists()


# ---- data -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz 0123456789+="])


def test_held_out_rows_are_the_last_ones(config, data, tokenizer):
    settings = config(f"data.path={data(*GOOD)}", "data.eval_size=2")
    train, held_out = load_data(settings, tokenizer)
    assert [e.prompt for e in train.examples] == ["say abc", "say def", "say ghi"]
    assert [e.prompt for e in held_out.examples] == ["say jkl", "say mno"]
    _, fewer = load_data(config(f"data.path={data(*GOOD)}", "data.eval_size=2", "eval.size=1"), tokenizer)
    assert [e.prompt for e in fewer.examples] == ["say jkl"]


def test_rows_that_are_not_used_are_counted_once_for_each_source(config, data, tokenizer):
    path = data({"prompt": "say " * 10}, *GOOD)
    other = data({"prompt": "say " * 10}, {"prompt": "abc"}, name="other.jsonl")
    drop = ["data.field=prompt", "data.overlong_prompts=drop"]
    one, both = config(f"data.path={path}", *drop), config(f"data.path={path}", f"data.eval_path={other}", *drop)
    line = ": prompts left out: 1 longer than max_prompt_tokens"
    assert left_out(*load_data(one, tokenizer)) == [f"{path}{line}"]
    assert left_out(*load_data(both, tokenizer)) == [f"{path}{line}", f"{other}, held out{line}"]
    same = config(f"data.path={path}", f"data.eval_path={path}", *drop)
    assert left_out(*load_data(same, tokenizer)) == [f"{path}{line}", f"{path}, held out{line}"]
    none = config(f"data.path={data(*GOOD)}", "data.field=prompt")
    assert left_out(*load_data(none, tokenizer)) == []


def test_a_missing_package_is_missed_before_the_warm_start(config, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_ray.config.extras.find_spec", lambda module: None)
    settings = config("rewards.0.function=rouge", "warm_start.steps=5")
    refused(settings, tmp_path / "run", ConfigError, r"rouge_score .*pip install 'rlhf-ray\[rewards\]'")


def test_a_file_of_its_own_for_evaluation(config, data, tokenizer):
    other = data({"prompt": "new one"}, {"prompt": "new two"}, {"prompt": "new three"}, name="other.jsonl")
    train, held_out = load_data(config(f"data.path={data(*GOOD)}", f"data.eval_path={other}"), tokenizer)
    assert len(train) == 5 and [e.prompt for e in held_out.examples] == ["new one", "new two"]


def test_a_task_has_its_own_test_problems(config, tokenizer):
    train, held_out = load_data(config("eval.size=500"), tokenizer)
    assert len(held_out) == 500 and len(train) > 5000
    assert not {e.prompt for e in train.examples} & {e.prompt for e in held_out.examples}


def test_a_limit_counts_before_the_split(config, data, tokenizer):
    settings = config(f"data.path={data(*GOOD)}", "data.limit=4", "data.eval_size=2")
    train, held_out = load_data(settings, tokenizer)
    assert [e.prompt for e in train.examples] == ["say abc", "say def"]
    assert [e.prompt for e in held_out.examples] == ["say ghi", "say jkl"]


# ---- roles ----------------------------------------------------------------------------------------------------


def test_a_reward_model_and_a_pretrained_policy(config, tmp_path, model_folder, data):
    judge = BertForSequenceClassification(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                   num_labels=2)
    )  # fmt: skip
    judge.save_pretrained(tmp_path / "judge")
    build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz "]).save_pretrained(tmp_path / "judge")
    settings = config(
        f"model.path={model_folder}", "model.tokenizer.path=null", f"data.path={data(*GOOD)}", "rewards=[]",
        f"reward_model={{path: '{tmp_path}/judge', output: prob}}",
    )  # fmt: skip
    summary = run_rl(settings, tmp_path / "run")
    assert 0 < summary["before"]["reward"] < 1
    assert summary["before"]["reward/reward_model"] == summary["before"]["reward"]
    assert not (tmp_path / "run" / "start").exists(), "the folder is used where it lies"
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_nothing_of_ray_is_imported_for_a_local_run(config, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now raises
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=ImportWarning)
        assert run_rl(config(), tmp_path / "run")["status"] == "finished"
