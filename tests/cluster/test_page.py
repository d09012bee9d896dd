"""docs/cluster.md: what it tells people to copy, run as it stands (Slurm's lines: test_slurm.py)."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

import pytest
import yaml

from cluster.simulate import Host
from tests.cluster.page import PAGE, lines_of

ROOT = PAGE.parents[1]
SEEN = """
import os
def seen(completions):
    return [float(len(os.environ["MY_API_KEY"]) + int(os.environ["MY_LEVEL"]))] * len(completions)
"""


def places(comment: str, hosts: list[Host]) -> list[Host]:
    """Whom "on the others ..." means."""
    for words, meant in (("on every machine", hosts), ("on the first", hosts[:1]), ("on the others", hosts[1:])):
        if comment.startswith(words):
            return meant
    raise AssertionError(f"on which machine is this: {comment!r}?")


@pytest.mark.system
def test_rays_lines_bring_up_two_hosts_and_train_on_both(simulated_hosts, commands, tiny_tree, tmp_path):
    hosts = simulated_hosts(2)
    secret = secrets.token_hex(8)
    # Of each host's CPUs so much that the reward does not fit beside learner and generator.
    workers = {"cpus_per_worker": 0.45 * os.cpu_count(), "env": {"MY_API_KEY": secret, "MY_LEVEL": 3}}
    tiny_tree |= {"ray": workers, "rewards": [{"function": "reward.py:seen"}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_tree))
    (tmp_path / "reward.py").write_text(SEEN)
    environment = {**os.environ, "PATH": commands(), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    here = {"10.0.0.1": hosts[0].address, "/shared": str(tmp_path), "=TOKEN": "=" + secrets.token_hex(16)}
    output = ""
    for comment, words in lines_of("With Ray alone"):
        words = [re.sub("|".join(map(re.escape, here)), lambda found: here[found[0]], word) for word in words]
        if words[0] == "export":
            environment |= dict(word.split("=", 1) for word in words[1:])
            continue
        for host in places(comment, hosts):
            done = host.run(*words, env=environment, cwd=tmp_path, capture_output=True)
            assert done.returncode == 0, f"{words} on {host.name}: {done.stdout}{done.stderr}"
            output += done.stdout
    assert "Ray is ready" in output and "2 machines" in output
    summary = json.loads((tmp_path / "runs" / "1" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 1)
    row = json.loads((tmp_path / "runs" / "1" / "metrics.jsonl").read_text())
    assert row["reward/mean"] == len(secret) + 3, "what ray.env says has reached the worker"
    written = [file for folder in (tmp_path / "runs", *(host.folder for host in hosts)) for file in folder.rglob("*")]
    files = [file for file in written if file.is_file()]
    assert any(file.name.startswith("raylet") for file in files), "Ray's logs are among them"
    assert [file for file in files if secret.encode() in file.read_bytes()] == []


def test_kubernetes_lines_name_what_there_is():
    build, apply, logs = [words for _, words in lines_of("With Kubernetes")]
    assert (ROOT / build[build.index("-f") + 1]).is_file() and (ROOT / apply[-1]).is_file()
    manifest = yaml.safe_load(Path(ROOT / apply[-1]).read_text())
    assert logs[-1] == f"job/{manifest['metadata']['name']}"
    image = build[build.index("-t") + 1]
    pods = manifest["spec"]["rayClusterSpec"]
    for group in (pods["headGroupSpec"], *pods["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"] == image
