"""What cluster/ and docker/ hold, held against schemas and linters: no machine of the kind is here to run them on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf_ray.config.load import apply_override, parse_config
from rlhf_ray.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CLUSTER, DOCKER = ROOT / "cluster", ROOT / "docker"
LAUNCHER = sorted((CLUSTER / "ray").glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
# SkyPilot's own checks come with the clouds' libraries.
SKYPILOT = {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "secrets", "setup", "run"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tool(name: str) -> str:
    """Of the `dev` extra, beside the interpreter."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not here; pip install -e '.[dev]'")
    return found


def problems_of(tree: Any, schema: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(tree)]


@pytest.fixture(scope="module")
def launcher_schema() -> Any:
    ray = pytest.importorskip("ray")
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.fixture(scope="module")
def kuberay_schema() -> Any:
    return read(Path(__file__).parent / "kuberay_schema.yaml")


@pytest.mark.parametrize("path", LAUNCHER, ids=name_of)
def test_the_launcher_takes_its_files(path, launcher_schema):
    tree = read(path)
    assert problems_of(tree, launcher_schema) == []
    assert problems_of(tree | {"maxworkers": 3}, launcher_schema) != []
    assert tree["head_node_type"] in tree["available_node_types"]


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_kuberay_takes_its_manifests(path, kuberay_schema):
    tree = read(path)
    assert problems_of(tree, kuberay_schema) == []
    cluster = tree["spec"].get("rayClusterSpec", tree["spec"])
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
        assert pod["securityContext"]["runAsUser"] == 1000, "the user of the images"
    for typo, place in (("replica", cluster["workerGroupSpecs"][0]), ("resource", pod["containers"][0])):
        place[typo] = 1
        assert problems_of(tree, kuberay_schema) != [], typo
        del place[typo]


def test_skypilot_knows_the_fields_of_its_file():
    tree = read(CLUSTER / "skypilot.yaml")
    assert tree.keys() <= SKYPILOT and tree["num_nodes"] == 2


@pytest.mark.parametrize("status", [0, 75])
def test_the_end_of_a_run_is_the_end_of_its_job_on_every_machine_of_skypilot(tmp_path, status):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    script = read(CLUSTER / "skypilot.yaml")["run"].replace("6500", str(port)).replace("/tmp/rlhf", str(tmp_path))
    # Who joins stays for as long as the head listens, and then ends with an error.
    address = f"('127.0.0.1', {port})"
    head = f"import socket, time; server = socket.create_server({address}); time.sleep(60)"
    member = f"import socket; connection = socket.create_connection({address}); connection.recv(1)"
    asked = tmp_path / "asked"
    (tmp_path / "ray").write_text(
        f'#!/bin/bash\necho "$1" >> "{asked}"\ncase "$*" in\n*--head*) exec {sys.executable} -c "{head}" ;;\n'
        f'*--address*) {sys.executable} -c "{member}"; exit 1 ;;\nesac\n'
    )
    joined = f'until [ "$(wc -l < "{asked}")" = 2 ]; do sleep 0.1; done'
    (tmp_path / "rlhf-ray").write_text(f"#!/bin/sh\n{joined}\nsleep 0.5\nexit {status}\n")
    for name in ("ray", "rlhf-ray"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SKYPILOT_NODE_IPS": "127.0.0.1"}
    jobs = [
        subprocess.Popen(["bash", "-c", script], env={**environment, "SKYPILOT_NODE_RANK": rank}) for rank in "01"
    ]
    try:
        assert [job.wait(30) for job in jobs] == [status, 0]
    finally:
        for job in jobs:
            job.kill()
    assert asked.read_text().split() == ["start", "start"], "`ray stop` would end SkyPilot's own"


def scripts() -> Iterator[tuple[str, str]]:
    """(name, text) of everything that a bash will run."""
    for path in (CLUSTER / "slurm.sbatch", DOCKER / "entrypoint.sh"):
        yield name_of(path), path.read_text()
    (node,) = re.findall(r"\nnode='\n(.*?)'\n", (CLUSTER / "slurm.sbatch").read_text(), re.DOTALL)
    yield "what slurm.sbatch runs on each node", node
    for part in ("setup", "run"):
        yield f"{part} of skypilot.yaml", read(CLUSTER / "skypilot.yaml")[part]


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in scripts()])
def test_shellcheck_has_nothing_to_say(text):
    command = [tool("shellcheck"), "--shell=bash", "--severity=style", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `rlhf-ray rl ...` in these files, in words."""
    for path in sorted([*CLUSTER.rglob("*.yaml"), *CLUSTER.rglob("*.sbatch"), ROOT / "docs" / "cluster.md"]):
        text = re.sub(r"\\\n[# ]*|\n +(?=--|ray\.)", " ", path.read_text())
        for number, found in enumerate(re.findall(r"rlhf-ray (rl [^'`\n]*)", text)):
            yield f"{name_of(path)}-{number}", shlex.split(found, comments=True)


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in commands()])
def test_commands_set_what_there_is(words, tiny_tree):
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    for override in overrides:
        apply_override(tiny_tree, override)
    config = parse_config(tiny_tree, RunConfig, source="the command")
    assert config.executor == "ray" or "executor=ray" not in words


# ------------------------------------------------------------ images


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_hadolint_has_nothing_to_say(path):
    done = subprocess.run([tool("hadolint"), "--no-color", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def instructions(path: Path) -> list[tuple[str, str]]:
    """(keyword, rest) of a Dockerfile, comments and line ends taken out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_has_what_a_cluster_asks_of_it(path):
    parts = instructions(path)
    arguments = dict(rest.split("=") for keyword, rest in parts if keyword == "ARG")
    for image in [rest.split()[0] for keyword, rest in parts if keyword == "FROM"]:
        for name, value in arguments.items():
            image = image.replace(f"${{{name}}}", value)
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", image), f"{image} is no exact tag"
    assert [rest for keyword, rest in parts if keyword == "USER"] == ["1000"], "a number: Kubernetes cannot look it up"
    last = max(number for number, (keyword, _) in enumerate(parts) if keyword == "FROM")
    installed = " ".join(rest for keyword, rest in parts[last:] if keyword == "RUN").split()
    wanted = {"bubblewrap", "wget", "tini", "g++", "libnuma1"}
    rdma = {"libibverbs1", "ibverbs-providers", "librdmacm1"}
    assert wanted | (rdma if path.suffix == ".gpu" else set()) <= set(installed)
    for keyword, rest in parts:
        sources = rest.split()[:-1] if keyword == "COPY" and not rest.startswith("--from") else []
        assert all((ROOT / source).exists() for source in sources), rest


@pytest.fixture
def entrypoint(tmp_path):
    """Run it with commands that only say how they were called: (exit status, stdout, stderr)."""
    for name in ("ray", "rlhf-ray", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)

    def run(*words: str, **environment: str) -> tuple[int, str, str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            [str(DOCKER / "entrypoint.sh"), *words], capture_output=True, text=True,
            env={"PATH": path, "WAIT_S": "1", **environment},
        )  # fmt: skip
        return done.returncode, done.stdout.strip(), done.stderr

    return run


@pytest.fixture
def head():
    """The address of something that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("words", "called"), [
    ([], "rlhf-ray doctor"),
    (["rl", "run.yaml", "name=two words"], "rlhf-ray rl run.yaml name=two words"),
    (["head", "--num-cpus=2"], "ray start --head --block --port=6379 --dashboard-host=0.0.0.0 --num-cpus=2"),
    (["ray", "status"], "ray status"),
    (["python", "-V"], "python -V"),
    (["bash", "-c", "echo hello"], "hello"),
])  # fmt: skip
def test_the_entry_point_starts_what_it_is_told(entrypoint, words, called):
    status, out, _ = entrypoint(*words)
    assert (status, out) == (0, called)


def test_a_worker_and_a_job_join_a_head_that_answers(entrypoint, head):
    assert entrypoint("worker", head, "--num-gpus=8")[:2] == (0, f"ray start --block --address={head} --num-gpus=8")
    assert entrypoint("job", "rl", "run.yaml", RAY_ADDRESS=head)[:2] == (0, "rlhf-ray rl run.yaml")


def test_a_head_that_does_not_answer_or_has_no_name_is_said(entrypoint, head):
    status, out, err = entrypoint("worker", "127.0.0.1:1")
    assert (status, out) == (75, "") and "nothing answers at 127.0.0.1:1 after 1 s" in err
    assert entrypoint("worker")[0] != 0
    status, _, err = entrypoint("job", "rl", "run.yaml")
    assert status != 0 and "job needs RAY_ADDRESS" in err
    status, _, err = entrypoint("job", "rl", RAY_ADDRESS="auto")
    assert status == 2 and "'auto' is not HEAD:PORT" in err
