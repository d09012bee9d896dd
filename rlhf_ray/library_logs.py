"""What libraries print for their own developers stays unprinted; RLHF_RAY_LIBRARY_LOGS=1 gives all of it back.

Their errors reach the user as exceptions, and their warnings stay, but for those about what is chosen here on purpose.
A variable that the user has set himself (VLLM_LOGGING_LEVEL, TORCH_CPP_LOG_LEVEL, ...) stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "RLHF_RAY_LIBRARY_LOGS"

_QUIET = {
    # Notes of C++ code, on stderr: how memory is bound to its node, who has not opened a port yet.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of what is chosen here on purpose
}
SETTINGS = (VARIABLE, *_QUIET)  # all variables that say how much is printed


def wanted() -> bool:
    """Whether the user wants to see it all."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on")


def quiet(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set that up in an environment, unless all is wanted. Libraries read it when they load: call it before."""
    if not wanted():
        for name, value in _QUIET.items():
            environment.setdefault(name, value)
