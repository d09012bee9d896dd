"""A vLLM generator in a process of its own, for the benchmarks: the calls travel over a local socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """What all stages share; travels to their processes as JSON."""

    folder: str  # of the model
    cpu: bool
    rows: int  # completions in the throughput stage
    new_tokens: int
    gpus: int
    call_deadline_s: float = 240.0

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    @property
    def dtype(self) -> str:
        return "float32" if self.cpu else "bfloat16"


def make_generator(setup: Setup, transport: str, *, share: float = 0.4, sleep_mode: bool = False) -> Any:
    from rlhf_ray.roles.generator_vllm import VLLMGenerator

    return VLLMGenerator(
        setup.folder,
        transport=transport,
        dtype=setup.dtype,
        max_model_len=1024,
        gpu_memory_utilization=share,
        kv_cache_gb=0.25,
        sleep_mode=sleep_mode,
    )


def memory(setup: Setup) -> dict[str, float]:
    import torch

    if setup.cpu:
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"used_gb": (total - free) / GIB, "peak_torch_gb": torch.cuda.max_memory_allocated() / GIB}


class RemoteGenerator:
    """Calls a generator process over a socket, each call with a deadline."""

    def __init__(self, line: Connection, deadline_s: float) -> None:
        self._line = line
        self._deadline_s = deadline_s

    def _call(self, name: str, *args: Any) -> Any:
        self._line.send((name, args))
        if not self._line.poll(self._deadline_s):
            raise TimeoutError(f"{name} did not return in {self._deadline_s:.0f} s")
        kind, value = self._line.recv()
        if kind == "error":
            raise RuntimeError(value)
        return value

    @property
    def version(self) -> int:
        return int(self._call("version"))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self._call(name, *args)


def serve(address: str, setup: Setup, options: dict[str, Any]) -> None:
    """The generator process."""
    with Client(address) as line:
        try:
            generator = make_generator(setup, **options)
            line.send(("ok", None))
        except Exception as error:
            line.send(("error", f"{type(error).__name__}: {error}"))
            raise
        while True:
            name, args = line.recv()
            try:
                member = memory(setup) if name == "memory" else getattr(generator, name)
                line.send(("ok", member(*args) if callable(member) else member))
            except Exception as error:
                line.send(("error", f"{type(error).__name__}: {error}"))
            if name == "close":
                return


@contextmanager
def generator_process(setup: Setup, *, gpu: int = 0, **options: Any) -> Iterator[RemoteGenerator]:
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "line")
        with Listener(address) as listener:
            environment = dict(os.environ)
            if not setup.cpu:
                visible = os.environ.get("CUDA_VISIBLE_DEVICES")
                devices = visible.split(",") if visible else [str(i) for i in range(setup.gpus)]
                environment["CUDA_VISIBLE_DEVICES"] = devices[gpu]
            command = [sys.executable, __file__, address, json.dumps(asdict(setup)), json.dumps(options)]
            child = subprocess.Popen(command, env=environment)
            listener._listener._socket.settimeout(setup.call_deadline_s)  # type: ignore[attr-defined]
            try:
                line = listener.accept()
                if not line.poll(setup.call_deadline_s):
                    raise TimeoutError("the generator process did not start in time")
                kind, value = line.recv()
                if kind == "error":
                    raise RuntimeError(value)
                yield RemoteGenerator(line, setup.call_deadline_s)
                line.send(("close", ()))
                child.wait(60)
            finally:
                child.kill()
                child.wait()


if __name__ == "__main__":
    serve(sys.argv[1], Setup(**json.loads(sys.argv[2])), json.loads(sys.argv[3]))
