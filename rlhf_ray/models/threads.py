"""How a process waits for its own threads: briefly, so that a busy neighbour costs its fair share and no more.

PyTorch computes with OpenMP's threads, and at the end of each parallel loop they wait for the slowest. By default they
wait spinning. While another process holds one of the cores, the slowest thread is not running at all, and the others
spin away the time that it would need: on two cores with one busy neighbour, a step took 11.8 s in place of 0.2. A short
spin and then sleep costs a tenth on an idle machine (0.22 s) and a factor of two beside that neighbour (0.44 s).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Of GNU's OpenMP (PyTorch's Linux wheels): turns of a waiting loop. Of LLVM's and Intel's (macOS, conda): ms.
_SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
_POLICY = "OMP_WAIT_POLICY"
WAITING = (_POLICY, *_SHORT_WAIT)  # all variables that say how threads wait


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set that up in an environment; what the user has set about waiting stays as it is.

    OpenMP reads its variables when its library loads: call it before anything imports torch.
    """
    if _POLICY not in environment:
        for name, value in _SHORT_WAIT.items():
            environment.setdefault(name, value)
