"""What libraries print for their own developers stays unprinted; RLHF_RAY_LIBRARY_LOGS=1 gives all of it back.

Their errors reach the user as exceptions, and their warnings stay, but for those about what is chosen here on purpose.
A variable that the user has set himself (VLLM_LOGGING_LEVEL, TORCH_CPP_LOG_LEVEL, ...) stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

VARIABLE = "RLHF_RAY_LIBRARY_LOGS"

_QUIET = {
    # Notes of C++ code, on stderr: how memory is bound to its node, who has not opened a port yet.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of what is chosen here on purpose
}
SETTINGS = (VARIABLE, *_QUIET)  # all variables that say how much is printed
# What a run in this process may set: for the libraries' logs, DeepSpeed's rank, vLLM's engine.
_OF_A_RUN = ("TORCH", "PYTORCH_", "VLLM_", "DS_", "OMP_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def wanted() -> bool:
    """Whether the user wants to see it all."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on")


def quiet(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set that up in an environment, unless all is wanted. Libraries read it when they load: call it before."""
    if not wanted():
        for name, value in _QUIET.items():
            environment.setdefault(name, value)


def quiet_libraries(device: str) -> None:
    """Called before a run imports what computes, for its `device`."""
    import torch

    # Transformers imports DeepSpeed, where it is installed, to see whether it is there; and DeepSpeed looks for an
    # accelerator and announces what it found, unless it has been told.
    found = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", found)
    if not wanted():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for every folder that is loaded hides the one that matters


@contextmanager
def borrowed(device: str, environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """A run inside somebody else's program: quiet in here, and afterwards the environment and Transformers' progress
    bars are as they were."""
    before = {name: value for name, value in environment.items() if name.startswith(_OF_A_RUN)}
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    quiet(environment)
    quiet_libraries(device)
    try:
        yield
    finally:
        for name in [name for name in environment if name.startswith(_OF_A_RUN) and name not in before]:
            del environment[name]
        environment.update(before)
        if bars:
            logging.enable_progress_bar()
