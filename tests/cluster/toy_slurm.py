"""A real Slurm on simulated hosts: its daemons, with nothing of this machine's own configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.simulate import Host

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
# The number of the first job: another in each process that runs tests, for jobs have folders in /tmp.
FIRST_JOB = os.getpid()
# Where Debian puts what an administrator runs; a user's PATH may lack it.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIG = """ClusterName=toy
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MinJobAge=3600
FirstJobId={job}
SchedulerParameters=sched_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeAddr={address} CPUs={cpus} RealMemory=1000 Gres=gpu:2 State=UNKNOWN"
# Stand-ins for devices: Slurm counts them and sets CUDA_VISIBLE_DEVICES.
GPUS = "NodeName={name} Name=gpu File=/dev/null\nNodeName={name} Name=gpu File=/dev/zero\n"


def why_not() -> str | None:
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(missing)} here; apt install slurm-wlm munge" if missing else None


class Slurm:
    """Its commands, given on the first host."""

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self.first, self.folder = hosts[0], folder
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}

    def __call__(self, *command: str, **options: object) -> str:
        environment = self.environment | options.pop("env", {})
        done = self.first.run(*command, env=environment, capture_output=True, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def wait_until_idle(self, seconds: float = 120.0) -> None:
        """Every node is there and has nothing to do."""
        until = time.monotonic() + seconds
        ask = ["sinfo", "--noheader", "--format=%T"]  # a line for each state
        while self.first.run(*ask, env=self.environment, capture_output=True).stdout != "idle\n":
            assert time.monotonic() < until, self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def wait_for(self, said: str, *command: str, seconds: float = 120.0) -> str:
        """Ask until one line of the answer, or a word in it, is `said`; returns the answer."""
        until = time.monotonic() + seconds
        while said not in (answer := self(*command)).split():
            assert time.monotonic() < until, f"{command} says {answer!r}, not {said!r}\n{self.logs()}"
            time.sleep(0.2)
        return answer


@contextmanager
def running(hosts: Sequence[Host], cpus: int) -> Iterator[Slurm]:
    """A Slurm whose nodes are the hosts; it ends with them."""
    # A socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        slurm = Slurm(hosts, folder)
        nodes = "\n".join(NODE.format(name=host.name, address=host.address, cpus=cpus) for host in hosts)
        (folder / "slurm.conf").write_text(
            CONFIG.format(first=hosts[0].name, address=hosts[0].address, folder=folder, nodes=nodes, job=FIRST_JOB)
        )
        (folder / "gres.conf").write_text("".join(GPUS.format(name=host.name) for host in hosts))
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\nConstrainDevices=no\n")
        (folder / "state").mkdir()
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

        def start(host: Host, *command: str) -> None:
            daemon = host.start(
                *command, env=slurm.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(daemon.wait)
            stack.callback(host.power_off)  # whatever a daemon waits for

        files = [f"--{kind}={folder}/munge.{end}" for kind, end in (
            ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
        )]  # fmt: skip
        start(hosts[0], "munged", "--foreground", "--force", f"--key-file={key}", *files)
        while not (folder / "munge.sock").exists():
            time.sleep(0.05)
        start(hosts[0], "slurmctld", "-D")
        for host in hosts:
            start(host, "slurmd", "-D", "-N", host.name)
        slurm.wait_until_idle()
        yield slurm
