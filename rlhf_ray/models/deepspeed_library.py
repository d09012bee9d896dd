"""DeepSpeed, imported for the device of the process group, and what keeps it from printing."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from rlhf_ray.errors import ModelError


def deepspeed_library() -> Any:
    """The library, for the device of the process group."""
    cpu = torch.distributed.get_backend() == "gloo"
    if cpu:
        # Read when DeepSpeed is first imported (by accelerate, if not by us).
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ModelError(
            "learner.engine=deepspeed needs DeepSpeed, which is not installed; "
            "pip install 'rlhf-ray[deepspeed]', or set learner.engine=torch"
        ) from error
    # DeepSpeed's collectives by their old torch names: one line a call, and nothing a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    name = deepspeed.get_accelerator().device_name()
    if (name == "cpu") != cpu:
        raise ModelError(
            f"DeepSpeed was loaded for {name}, but the learner's device is {'cpu' if cpu else 'cuda'}; "
            "set DS_ACCELERATOR to the device before Python starts"
        )
    if cpu:
        # A collective of DeepSpeed's own, for its inference only: every fresh machine would compile it for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    # DeepSpeed prints memory reports and layout notes that no log level switches off.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
