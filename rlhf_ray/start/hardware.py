"""What a run computes on: this machine, or what the workers of a cluster have."""

from __future__ import annotations

from functools import partial

import torch

from rlhf_ray.config.sections import TrainingRunConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.devices import Hardware, choose_hardware


def hardware_of(config: TrainingRunConfig) -> Hardware:
    """Where the roles compute: on this machine, or on what the cluster's workers have."""
    if config.executor == "ray":
        try:
            from rlhf_ray.remote.cluster import gpus_of_cluster
        except ImportError as error:
            raise ConfigError(
                f"executor=ray needs Ray, which cannot be imported ({error}); install it with "
                "`pip install 'rlhf-ray[ray]'`, or set executor=local"
            ) from error

        # There is no run yet that could print it.
        gpus = gpus_of_cluster(config.ray.address, config.ray.start_deadline_s, partial(print, flush=True))
        if gpus is not None:
            return choose_hardware(config.device, config.dtype, cuda=gpus > 0, mps=False)
    return choose_hardware(config.device, config.dtype)


def own_hardware(roles: Hardware) -> Hardware:
    """What this process computes on itself (the warm start): its best device, unless the run is to stay on the CPU."""
    if roles.device == "cpu":
        return roles
    return choose_hardware(dtype="float32" if roles.dtype == torch.float32 else "auto")
