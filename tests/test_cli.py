"""The commands: what they print, and that every refusal is exit status 2 and one readable paragraph."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from rlhf_ray import cli
from rlhf_ray.commands.summary import print_summary
from rlhf_ray.config.load import load_config
from rlhf_ray.config.shipped import shipped_config
from rlhf_ray.models.library_logs import quiet_libraries
from rlhf_ray.run.directory import RunDirectory


@pytest.fixture
def tiny(tmp_path, tiny_tree):
    path = tmp_path / "tiny.yaml"
    # A reward of 0 or 1, for the table to have an accuracy.
    path.write_text(yaml.safe_dump({**tiny_tree, "rewards": [{"function": "exact_answer"}]}))
    return path


# ---- what an import costs -------------------------------------------------------------------------------------


# All that `rlhf-ray --help` may load: typer, and what typer loads. `make bench` has the seconds.
LIGHT = {"rlhf_ray", "typer", "typing_extensions", "click", "rich", "shellingham", "annotated_doc"}


def test_the_command_line_loads_nothing_heavy(repo_root):
    code = (
        "import sys\nbefore = set(sys.modules)\nimport rlhf_ray.cli\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(loaded - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root, check=True)
    loaded = set(done.stdout.split())
    assert {"rlhf_ray", "typer"} <= loaded <= LIGHT, f"needless for --help: {loaded - LIGHT}"


def test_help(rlhf_ray):
    status, out, _ = rlhf_ray("--help")
    assert status == 0
    for command in ("rl", "quickstart", "doctor"):
        assert command in out
    status, out, _ = rlhf_ray("rl", "--help")
    assert status == 0
    for option in ("--run-dir", "--resume", "--dry-run"):
        assert option in out


def test_version(rlhf_ray):
    status, out, _ = rlhf_ray("--version")
    assert status == 0 and re.fullmatch(r"rlhf-ray \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(("command", "expected"), [
    ("grpo", "rlhf-ray rl CONFIG"), ("train_ppo_ray", "executor=ray"), ("reward", "rlhf-ray rm CONFIG"),
    ("piplines", "Did you mean 'pipeline'"),
])  # fmt: skip
def test_a_command_of_another_tool_is_refused_with_ours(rlhf_ray, command, expected):
    status, _, err = rlhf_ray(command, "some.yaml")
    assert status == 2 and expected in err


def test_no_arguments_show_the_help(rlhf_ray):
    _, out, err = rlhf_ray()
    assert "Usage" in out + err


# ---- dry run --------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_resolved_config_and_the_plan(rlhf_ray, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = rlhf_ray("rl", tiny, "algorithm.name=ppo", "learner.lr=1e-7", "--dry-run")
    assert status == 0 and "# placement: executor local, device cpu, float32" in out and "critic" in out
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    assert load_config(printed) == load_config(tiny, ["algorithm.name=ppo", "learner.lr=1e-7"])
    assert not (tmp_path / "runs").exists(), "nothing was run"


def test_quickstart_uses_the_config_of_the_repository(rlhf_ray, repo_root):
    status, out, _ = rlhf_ray("quickstart", "steps=7", "--dry-run")
    assert status == 0
    printed = yaml.safe_load(out)
    assert printed["steps"] == 7 and printed["name"] == "grpo-arithmetic"
    assert shipped_config("grpo_arithmetic.yaml") == repo_root / "configs" / "grpo_arithmetic.yaml"


def test_a_config_that_comes_with_the_package_by_its_name(rlhf_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = rlhf_ray("serve-reward", "shipped:reward_server.yaml", "--dry-run")
    assert status == 0 and yaml.safe_load(out)["port"] == 8000
    status, _, err = rlhf_ray("serve-reward", "shipped:reward_sever.yaml", "--dry-run")
    assert status == 2 and "does not exist; did you mean" in err and "reward_server.yaml?" in err


def test_the_other_ending_of_the_quickstart_is_a_pipeline(rlhf_ray, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text("".join(f'{{"text": "it is {i} and more", "label": {i % 2}}}\n' for i in range(1000)))
    status, out, _ = rlhf_ray("quickstart", "--preferences", "ppo.steps=7", f"values.train={rows}", "--dry-run")
    assert status == 0
    assert [line.split()[2] for line in out.splitlines() if line.startswith("# stage")] == [
        "sft:", "judge:", "pairs:", "rm:", "ppo:", "dpo:", "eval:",
    ]  # fmt: skip
    assert "steps: 7" in out and f"path: {rows}" in out and "path: RUN/rm/model" in out


# ---- a run ----------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_table(rlhf_ray, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", "rl", str(tiny), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert "1 steps in" in out and "accuracy" in out and "before" in out
    assert f"run directory: {tmp_path}/run\n" in out
    assert f"Everything is in {tmp_path}/run; the model is in {tmp_path}/run/model\n" in out, "paths in one piece"
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def sample(completion: str) -> dict:
    return {"prompt": "p", "completion": completion, "reward": 0.5}


def test_a_metric_that_is_there_only_once_does_not_break_the_table(capsys):
    """accuracy exists only while all rewards are 0 or 1."""
    summary = {
        "steps": 1, "seconds": 1.0, "run_dir": "x",
        "before": {"reward": 0.0, "accuracy": 0.0, "samples": [sample("was")]},
        "after": {"reward": 0.25, "distinct_1": 1, "samples": [sample("[/red] is")]},
    }  # fmt: skip
    print_summary(summary, writes=False)
    out = capsys.readouterr().out
    assert "rlhf-ray generate" not in out
    rows = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:4]] for line in out.splitlines()
            if line.count("│") == 4}  # fmt: skip
    assert rows["accuracy"] == ["0.000", ""] and rows["distinct_1"] == ["", "1.000"]
    assert rows["reward"] == ["0.000", "0.250"] and "[/red] is  [0.50]" in out


def test_an_interrupted_run_says_how_to_go_on(rlhf_ray, tiny, tmp_path, monkeypatch):
    def train(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_ray.start.rl.train", train)
    status, out, err = rlhf_ray("rl", tiny, "--run-dir", tmp_path / "run")
    assert status == 130 and err.endswith("rlhf-ray: interrupted\n")
    assert "interrupted after step 0 of 1, before its first checkpoint (the first is due after step 50): " in out
    assert "--resume auto begins again at step 0, from the policy that is already made" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.leraning_rate=1", "rollout.group_size=1"], "2 problems"),
        (["learner.rl=1"], "learner.rl: unknown key; did you mean learner.lr?"),
        (["data.path=gone.jsonl"], "gone.jsonl: no such file; "),
        (["rewards.0.function=sentimant"], "did you mean 'sentiment'"),
        (["model.tokenizer.path=./gone"], "./gone: no such folder; give an existing model folder"),
        (["nonsense"], "override 'nonsense' is not of the form section.key=value"),
        (["rewards.0.function=length_penalty"], "reward length_penalty needs 'free_tokens', which is not set"),
        (["seed=99999999999999999999"], "seed: input should be less than 4294967296"),
        (["device=cuda"], "device=cuda: torch sees no CUDA device; check the driver"),
    ],
)
def test_bad_input_is_status_2_and_one_paragraph(rlhf_ray, tiny, tmp_path, monkeypatch, overrides, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = rlhf_ray("rl", tiny, *overrides, "--run-dir", tmp_path / "run")
    assert status in (2, 3) and err.startswith("rlhf-ray: ") and expected in err
    assert "Traceback" not in err + out and "\n\n" not in err
    assert not (tmp_path / "run").exists()


def test_a_typo_in_the_name_of_the_file(rlhf_ray, tiny):
    status, _, err = rlhf_ray("rl", str(tiny).replace("tiny.yaml", "tinny.yaml"))
    assert status == 2 and f"did you mean {tiny}?" in err


def test_resume_takes_auto_or_never(rlhf_ray, tiny):
    status, _, err = rlhf_ray("rl", tiny, "--resume", "yes")
    assert status == 2 and "'yes' is not one of" in err and "never" in err


def test_a_run_that_is_terminated_writes_down_how_far_it_got(rlhf_ray, tiny, tmp_path, monkeypatch):
    """In a reward, whose own sys.exit() would be its failure; and again while the run writes it down."""
    write_summary = RunDirectory.write_summary

    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    def terminated_again(directory, summary):
        terminated()
        write_summary(directory, summary)

    monkeypatch.setattr("rlhf_ray.rewards.builtin.exact_answer", terminated)
    monkeypatch.setattr(RunDirectory, "write_summary", terminated_again)
    status, out, err = rlhf_ray("rl", tiny, "rewards.0.on_failure=drop_group", "--run-dir", tmp_path / "run")
    assert status == 130 and "interrupted after step 0 of 1" in out and err.endswith("rlhf-ray: interrupted\n")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_a_warning_is_one_line_without_a_path(tiny, repo_root):
    code = "import warnings; from rlhf_ray import cli; cli._plain_warnings(); warnings.warn('look', stacklevel=1); "
    code += "warnings.warn('old', DeprecationWarning, stacklevel=1); warnings.warn('new', FutureWarning, stacklevel=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root, check=True)
    assert done.stderr == "rlhf-ray: warning: look\n"


def test_a_line_of_the_table_is_a_line(capsys):
    summary = {"steps": 1, "seconds": 1.0, "run_dir": "x", "before": {"samples": [sample("one\ntwo")]},
               "after": {"samples": [sample("three")]}}  # fmt: skip
    print_summary(summary, writes=False)
    assert r"one\ntwo" in capsys.readouterr().out


def test_a_fault_of_the_program_keeps_its_traceback(tiny, monkeypatch):
    def run_rl(*args, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr("rlhf_ray.start.rl.run_rl", run_rl)
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", "rl", str(tiny)])
    with pytest.raises(AssertionError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(("device", "cuda", "expected"), [
    ("auto", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu"),
])  # fmt: skip
def test_deepspeed_is_told_its_accelerator(monkeypatch, device, cuda, expected):
    monkeypatch.setenv("DS_ACCELERATOR", "undone afterwards")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    quiet_libraries(device)
    assert os.environ["DS_ACCELERATOR"] == expected


@pytest.mark.system
def test_the_installed_command(tiny, tmp_path, repo_root):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_ray.cli", "rl", str(tiny), "device=auto", "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, cwd=repo_root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accelerator" not in (done.stdout + done.stderr).lower(), "DeepSpeed has nothing to announce"
    again = subprocess.run(
        [sys.executable, "-m", "rlhf_ray.cli", "rl", str(tiny), "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, cwd=repo_root,
    )  # fmt: skip
    assert again.returncode == 2 and "holds another run" in again.stderr and "Traceback" not in again.stderr
