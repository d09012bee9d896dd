"""Devices that this machine does not have are tested through the seam: cuda= and mps= say what there is."""

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.models import deepspeed_engine
from rlhf_ray.models.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.models.devices import Hardware, choose_hardware, release_memory, with_index


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (True, True, "cuda", torch.bfloat16),
        (True, False, "cuda", torch.bfloat16),
        (False, True, "mps", torch.float32),
        (False, False, "cpu", torch.float32),
    ],
)
def test_auto_takes_cuda_then_mps_then_cpu_and_the_dtype_follows(cuda, mps, device, dtype):
    assert choose_hardware(cuda=cuda, mps=mps) == Hardware(device, dtype)


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_a_device_by_name(device):
    assert choose_hardware(device, "float32", cuda=True, mps=True) == Hardware(device, torch.float32)


def test_cpu_may_compute_in_bfloat16_when_asked():
    assert choose_hardware("cpu", "bfloat16", cuda=True, mps=False) == Hardware("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda", "auto", "device=cuda: torch sees no CUDA device; .* set device=cpu"),
        ("mps", "auto", "device=mps: torch sees no Apple GPU; set device=auto"),
    ],
)
def test_a_device_that_is_not_there(device, dtype, message):
    with pytest.raises(ConfigError, match=message):
        choose_hardware(device, dtype, cuda=False, mps=False)


@pytest.mark.parametrize("device", ["mps", "auto"])
def test_bfloat16_on_mps(device):
    with pytest.raises(ConfigError, match="dtype=bfloat16 on MPS .*set dtype=float32 or auto"):
        choose_hardware(device, "bfloat16", cuda=False, mps=True)


def test_torch_is_asked_where_nobody_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_hardware().device == "mps"


def test_cuda_without_an_index_is_the_current_gpu(monkeypatch):
    """Roles are told `cuda`; who sets the device must say which."""
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(torch.device("cpu")) == torch.device("cpu")


def test_memory_is_given_back_where_there_is_some(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    release_memory()
    assert not emptied, "a process that has not touched CUDA does not begin to"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    release_memory()
    assert emptied == [1]


def test_the_deepspeed_engine_says_which_gpu(monkeypatch):
    """On CUDA the first thing it does is to enter the group, with this device: as far as a CPU can follow it."""

    class Entered(Exception):
        pass

    def join(device, *rest):
        raise Entered(device)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(deepspeed_engine, "join_ranks", join)
    with pytest.raises(Entered, match="cuda:0|index=0"):
        DeepSpeedEngine(torch.nn.Linear(2, 2), device="cuda")
