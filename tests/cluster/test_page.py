"""docs/cluster.md: what it tells people to copy, run as it stands (Slurm's lines: test_slurm.py)."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.cluster.page import PAGE, lines_of

ROOT = PAGE.parents[1]


def test_kubernetes_lines_name_what_there_is():
    build, apply, logs = [words for _, words in lines_of("With Kubernetes")]
    assert (ROOT / build[build.index("-f") + 1]).is_file() and (ROOT / apply[-1]).is_file()
    manifest = yaml.safe_load(Path(ROOT / apply[-1]).read_text())
    assert logs[-1] == f"job/{manifest['metadata']['name']}"
    image = build[build.index("-t") + 1]
    pods = manifest["spec"]["rayClusterSpec"]
    for group in (pods["headGroupSpec"], *pods["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"] == image
