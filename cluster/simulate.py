"""Several hosts on one machine: each has its own network, name, processes and mounts. To try a cluster before renting.

    sudo $(which python) cluster/simulate.py --hosts 2 --cpus 4 -- \\
        rlhf-ray rl configs/grpo_arithmetic.yaml executor=ray ray.address=auto

starts a Ray head on the first host, Ray on the others, and the command on the first. Linux, as root: a host is a set of
kernel namespaces. It has its own /dev/shm and /tmp/ray; all other files are everybody's, as on a shared file system.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

SUBNET = "10.91.0"
RAY_PORT = 6379
OWN = ("/dev/shm", "/tmp/ray")
TOOLS = ("ip", "nsenter", "unshare")

# It lives until its standard input ends, which is when whoever made it ends, however that comes about. As process 1 of
# its host it takes all others with it, and it is a shell because a shell reaps the processes that others leave behind.
HOLD = "echo ready; read -r _ || true"
FURNISH = f"""set -e
folder=$1; hostname "$2"; shift 2
ip link set lo up
mount --bind "$folder/hosts" /etc/hosts
for path; do
    mkdir -p "$folder/own$path" "$path"
    if [ "$path" = /dev/shm ]; then mount -t tmpfs none "$path"; else mount --bind "$folder/own$path" "$path"; fi
done
{HOLD}"""


class SimulationError(RuntimeError):
    """This machine cannot pretend to be several, or a command that makes it so has failed."""


def why_not() -> str | None:
    """What stops this machine from simulating hosts, and what to do; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return "only Linux has network namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not on the PATH; apt install iproute2 util-linux"
    probe = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "ip", "link", "add", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces here ({done.stderr.strip()}); run as root (sudo)"


class _Namespaces:
    """A set of namespaces, kept open by a process of its own."""

    def __init__(self, kinds: Sequence[str], script: str, arguments: Sequence[str] = ()) -> None:
        command = ["unshare", *(f"--{kind}" for kind in kinds), "bash", "-c", script, "bash", *arguments]
        self.holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # ctrl-C at the terminal is for the command, not for its host
        )  # fmt: skip
        said = self.holder.stdout.readline()
        if said != "ready\n":
            said += self.holder.stdout.read()
            self.end()
            raise SimulationError(f"a simulated host did not start: {said.strip()}")

    @property
    def pid(self) -> int:
        return self.holder.pid

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.holder.stdin.close()
        self.holder.wait()
        self.holder.stdout.close()


class Host:
    """One simulated machine.

    Attributes:
        name, address: as the others know it.
        folder: of its own files, seen from outside: `own/tmp/ray` holds Ray's logs.
    """

    def __init__(self, switch: _Namespaces, folder: Path, number: int, own: Sequence[str]) -> None:
        self.name, self.address = f"h{number}", f"{SUBNET}.{number}"
        self.folder = folder
        self._switch, self._port, self._own = switch, f"port{number}", tuple(own)
        self._inside: _Namespaces | None = None

    def power_on(self) -> None:
        kinds = ("net", "uts", "mount", "ipc", "pid", "fork", "mount-proc", "propagation=private")
        self._inside = _Namespaces(kinds, FURNISH, [str(self.folder), self.name, *self._own])
        self._wire("link", "add", "name", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        self._wire("link", "set", self._port, "up")
        for words in ("address add {}/24 dev eth0", "link set eth0 up", "route add default dev eth0"):
            _do(self.command("ip", *words.format(self.address).split()))
        self.mend()

    def power_off(self) -> None:
        """All its processes die at once, as when a machine loses its power."""
        if self._inside is not None:
            # First, for the kernel would tell the others that their connections are closed.
            self._wire("link", "delete", self._port)
            self._inside.end()
            self._inside = None

    def cut(self) -> None:
        """The network loses what this host sends and what is sent to it; nobody is told."""
        self._wire("link", "set", self._port, "nomaster")

    def mend(self) -> None:
        self._wire("link", "set", self._port, "master", "switch")

    @property
    def pid(self) -> int:
        if self._inside is None:
            raise SimulationError(f"{self.name} is switched off")
        return self._inside.pid

    def command(self, *command: str, cwd: Path | str = "") -> list[str]:
        """`command` as it is run on this host, in the folder `cwd`. A process that is in there dies with the host."""
        kinds = ("net", "uts", "mount", "ipc", f"pid=/proc/{self.pid}/ns/pid_for_children")
        inside = ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in kinds)]
        # Looked up in there: the host may have a folder of its own at that path.
        return [*inside, "env", "-C", str(cwd or Path.cwd()), *command]

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`command`, to its end; `options` are subprocess.run's."""
        return subprocess.run(self.command(*command, cwd=options.pop("cwd", "")), text=True, **options)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Begin `command`; `options` are subprocess.Popen's. `send` gives it a signal."""
        return subprocess.Popen(self.command(*command, cwd=options.pop("cwd", "")), text=True, **options)

    def _wire(self, *words: str) -> None:
        _do(["nsenter", f"--target={self._switch.pid}", "--net", "ip", *words])


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Give a signal to the command that `Host.start` began; what stands around it passes none on, and ends with it."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), number)


@contextmanager
def simulated(folder: Path, count: int = 2, own: Sequence[str] = (), debian: bool = True) -> Iterator[list[Host]]:
    """`count` hosts, h1 at 10.91.0.1 and so on, switched on. At the end they and all that runs on them are gone.

    Args:
        folder: an empty one for what is theirs alone.
        own: folders that each host has its own of, beside /dev/shm and /tmp/ray.
        debian: /etc/hosts gives a host's own name a loopback address, as Debian's installer does; otherwise it has
            every name with its address.
    Raises:
        SimulationError: what `why_not` says.
    """
    problem = why_not()
    if problem:
        raise SimulationError(problem)
    with ExitStack() as stack:
        script = f"ip link add name switch type bridge && ip link set switch up && {{ {HOLD}; }}"
        switch = _Namespaces(["net"], script)
        stack.callback(switch.end)
        hosts = [Host(switch, folder / f"h{n}", n, [*OWN, *own]) for n in range(1, count + 1)]
        names = "".join(f"{host.address} {host.name}\n" for host in hosts)
        for host in hosts:
            (host.folder / "own").mkdir(parents=True)
            known = f"127.0.1.1 {host.name}\n" if debian else names
            (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}", encoding="utf-8")
            stack.callback(host.power_off)
            host.power_on()
        yield hosts


def with_token() -> dict[str, str]:
    """An environment for Ray and for who joins it: this process's own, and a token that nobody else knows."""
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


def start_ray(host: Host, head: Host, cpus: float, environment: Mapping[str, str], *options: str) -> None:
    """Start Ray on a host; it is the head's if `host` is `head`. It ends with the host.

    Args:
        environment: with a token, the same for all (`with_token`).
        options: of `ray start`.
    Raises:
        SimulationError: it does not start; with what it said.
    """
    where = [f"--address={head.address}:{RAY_PORT}"]
    if host is head:
        where = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]  # the later of two such options holds
    # The name leads to a loopback address, by which nobody else would find this host.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, f"--node-ip-address={host.address}"]
    command += [f"--num-cpus={cpus:g}", "--disable-usage-stats", *options]
    done = host.run(*command, env=environment, capture_output=True)
    if done.returncode:
        raise SimulationError(f"ray did not start on {host.name}: {(done.stdout + done.stderr)[-2000:]}")


def _do(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SimulationError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=4, help="that Ray believes each host has")
    parser.add_argument("command", nargs="+", help="runs on the first host, beside Ray's head")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        try:
            with simulated(Path(folder), arguments.hosts) as hosts:
                environment = with_token()
                for host in hosts:
                    start_ray(host, hosts[0], arguments.cpus, environment)
                return hosts[0].run(*arguments.command, env=environment).returncode
        except SimulationError as error:
            print(f"simulate: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
