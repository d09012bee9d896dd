"""What an actor does before it loads anything: its folder, its variables, its network."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import ray

from rlhf_ray.remote import network
from rlhf_ray.remote.host import Host, Surroundings


@pytest.fixture
def own_process(monkeypatch, tmp_path):
    """Afterwards this process is where it was, with what it had."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("own_process")
def test_an_actor_finds_its_folder_its_variables_and_its_interface(monkeypatch, tmp_path):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(network, "addresses", lambda: {"lo": ["127.0.0.1"], "eth1": ["10.0.0.7"]})
    (tmp_path / "runs").mkdir()
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    around = Surroundings(str(tmp_path / "runs"), {"HF_TOKEN": "t-1", "NCCL_SOCKET_IFNAME": "ib0"})
    host = Host("learner rank 0", pickle.loads(pickle.dumps(around)))
    assert Path.cwd() == tmp_path / "runs"
    assert os.environ["HF_TOKEN"] == "t-1"
    # What ray.env says comes before the interface of the node's address.
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth1", "ib0")
    host.release_port()


def test_secrets_are_not_in_what_may_be_printed():
    assert "t-1" not in repr(Surroundings("runs", {"HF_TOKEN": "t-1"}))
