"""Hosts that are namespaces of this machine: what is theirs, what they share, and how they fail."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import simulate
from cluster.simulate import Host, SimulationError, send, simulated

LISTEN = """
import socket
with socket.create_server(("0.0.0.0", 7000)) as server:
    print("listening", flush=True)
    server.accept()[0].sendall(b"hello")
"""
CALL = """
import socket, sys
try:
    print(socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])).recv(5).decode())
except OSError as error:
    print(type(error).__name__)
"""


def answer_of(caller: Host, address: str, seconds: float = 60.0) -> str:
    return caller.run(sys.executable, "-c", CALL, address, str(seconds), capture_output=True).stdout.strip()


def said(host: Host, *command: str, **options: Any) -> str:
    return host.run(*command, capture_output=True, check=True, **options).stdout.strip()


def test_a_host_has_a_name_an_address_processes_and_memory_of_its_own(simulated_hosts):
    first, second = simulated_hosts(2)
    assert (said(first, "hostname"), said(second, "hostname")) == ("h1", "h2")
    assert (first.address, second.address) == ("10.91.0.1", "10.91.0.2")
    # The names of processes: its first one (a shell), and ps.
    assert said(first, "ps", "-e", "-o", "comm=").split() == ["bash", "ps"]
    for folder in simulate.OWN:
        first.run("touch", f"{folder}/mine", check=True)
        assert said(first, "ls", folder) == "mine" and said(second, "ls", folder) == ""
        assert not Path(folder, "mine").exists()


def test_files_are_shared_but_for_own_folders(simulated_hosts, tmp_path):
    run, own = tmp_path / "run", tmp_path / "own"
    run.mkdir()
    first, second = simulated_hosts(2, own=[str(own)])
    for folder in (run, own):
        first.run("bash", "-c", "echo written > file", cwd=folder, check=True)
    assert said(second, "cat", f"{run}/file") == "written" == (run / "file").read_text().strip()
    assert said(second, "ls", str(own)) == "" == said(second, "bash", "-c", "ls", cwd=own)


@pytest.mark.parametrize("debian", [True, False])
def test_names_lead_where_the_distribution_leads_them(simulated_hosts, debian):
    first, second = simulated_hosts(2, debian=debian)
    ask = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"
    assert said(second, sys.executable, "-c", ask, "h2") == ("127.0.1.1" if debian else "10.91.0.2")


def test_a_cut_link_is_silent_and_can_be_mended(simulated_hosts):
    first, second = simulated_hosts(2)
    server = second.start(sys.executable, "-c", LISTEN, stdout=subprocess.PIPE)
    assert server.stdout.readline() == "listening\n"
    second.cut()
    assert answer_of(first, second.address, 0.2) == "TimeoutError"
    second.mend()
    first.run("ip", "neighbour", "flush", "all", check=True)  # the kernel would ask for its neighbour again in a second
    assert answer_of(first, second.address) == "hello"
    assert server.wait() == 0


def test_a_signal_reaches_the_command_and_its_status_comes_back(simulated_hosts):
    (host,) = simulated_hosts(1)
    loop = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done"
    command = host.start("bash", "-c", loop, stdout=subprocess.PIPE)
    command.stdout.readline()
    send(command, signal.SIGTERM)
    assert command.wait() == 7


def test_a_host_that_loses_its_power_takes_all_its_processes_with_it_and_comes_back_empty(simulated_hosts):
    first, second = simulated_hosts(2)
    server = second.start(sys.executable, "-c", LISTEN, stdout=subprocess.PIPE)
    server.stdout.readline()
    second.run("touch", "/dev/shm/gone", check=True)
    second.power_off()
    assert server.wait() != 0
    with pytest.raises(SimulationError, match="h2 is switched off"):
        second.run("true")
    second.power_on()
    assert said(second, "ls", "/dev/shm") == ""
    server = second.start(sys.executable, "-c", LISTEN, stdout=subprocess.PIPE)
    server.stdout.readline()
    assert answer_of(first, second.address) == "hello"


def test_hosts_end_with_the_process_that_made_them_even_if_it_is_killed(simulated_hosts, tmp_path):
    simulated_hosts(1)  # skips where nobody can
    code = f"""
import sys, time
from pathlib import Path
from cluster.simulate import simulated
with simulated(Path({str(tmp_path)!r}) / "other", 1) as (host,):
    print(host.start("sleep", "1000").pid, flush=True)
    sys.stdin.read()
"""
    maker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    inside = os.pidfd_open(int(maker.stdout.readline()))
    maker.kill()
    maker.wait()
    assert select.select([inside], [], [], 60)[0], "what ran on the host still runs"  # readable when it has ended


def test_who_cannot_make_namespaces_is_told_why(monkeypatch, tmp_path):
    monkeypatch.setattr(simulate.shutil, "which", lambda tool: None if tool == "ip" else tool)
    assert simulate.why_not() == "ip not on the PATH; apt install iproute2 util-linux"
    with pytest.raises(SimulationError, match="apt install iproute2"), simulated(tmp_path):
        pass
