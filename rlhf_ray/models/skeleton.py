"""A network without its weights: they come out of a checkpoint one by one, while somebody writes them to a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from rlhf_ray.errors import CheckpointError
from rlhf_ray.models.loading import load_pretrained, load_shape, network_kinds
from rlhf_ray.models.train_state import TrainState

_GENERATION = "generation_config.json"


def skeleton(
    state: TrainState, path: str | Path, *, classifies: bool, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The network that `state` was written by, LoRA's matrices left out. It has memory for its weights, and nothing was
    written to that: the system gives it to nobody before.

    `path`: the folder or Hub name that the network began as; code of its own comes from there. Raises ModelError.
    """
    shape = load_shape(path if trust_remote_code else state.folder, trust_remote_code=trust_remote_code)
    if trust_remote_code:  # the class, with what was trained: a classifier's labels are not those of its base
        code = shape.name_or_path
        shape = load_pretrained(type(shape), state.folder, "a model's config", True)
        shape.name_or_path = code
    kinds = network_kinds()
    factory = kinds.AutoModelForSequenceClassification if classifies else kinds.AutoModelForCausalLM
    options = {"trust_remote_code": True} if trust_remote_code else {}
    with torch.device("meta"):
        model = factory.from_config(shape, dtype=state.dtype, **options)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.config._name_or_path = model.name_or_path = str(path)
    if (state.folder / _GENERATION).is_file():
        model.generation_config = load_pretrained(GenerationConfig, state.folder, "how it generates", False)
    return model.eval()


class Filled:
    """Gives tensors of a network their values of a checkpoint, for as long as somebody looks at them."""

    def __init__(self, module: nn.Module, state: TrainState) -> None:
        named = [*module.named_parameters(), *module.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        self._state = state
        here = {name: tuple(p.shape) for name, p in module.named_parameters()}
        there = state.trained | state.fixed
        differ = sorted(name for name in here if here[name] != there.get(name))
        if differ:
            raise CheckpointError(
                f"{state.folder} does not fit the settings beside it: {differ[0]} is {here[differ[0]]} by these, and "
                f"{there.get(differ[0], 'missing')} there; was config.yaml or the base model changed by hand?"
            )

    def __call__(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        return self._filled(tensors)

    @contextmanager
    def _filled(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        for tensor in tensors:
            tensor.data = self._state.weight(self._names[id(tensor)])
        try:
            yield
        finally:
            for tensor in tensors:
                tensor.data = torch.empty(0, dtype=tensor.dtype)


