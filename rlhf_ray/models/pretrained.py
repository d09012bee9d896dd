"""A network in training as what leaves it: a plain Hugging Face model with LoRA merged, or the LoRA adapter alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from rlhf_ray.models.folders import follow_umask, save_folder
from rlhf_ray.models.loading import with_named_ends
from rlhf_ray.models.lora import GatherParameters, adapter_state, merged_state
from rlhf_ray.models.weight_files import leaves_as_it_is, unsaved_names, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# All that a learner has to give, or what LoRA has learned beside a model that stayed as it was.
Export = Literal["model", "adapter"]


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is a PEFT model (asked without importing peft)."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def plain_model(module: nn.Module) -> nn.Module:
    """The Hugging Face model inside a LoRA model, or `module` itself."""
    return module.get_base_model() if is_lora(module) else module


def plain_state(module: nn.Module, gather: GatherParameters | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) with LoRA merged; nothing copied.

    `gather` is a context manager that makes sharded parameters whole while a pair is out.
    """
    gather = gather or (lambda tensors: nullcontext())
    if is_lora(module):
        yield from merged_state(module, gather)
        return
    # state_dict, unlike named_parameters, lists a tied weight under each of its names.
    for name, tensor in module.state_dict(keep_vars=True).items():
        with gather([tensor]):
            yield name, tensor.detach()


def exported_state(
    module: nn.Module, what: Export = "model", gather: GatherParameters | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`plain_state`, or (PEFT's name, tensor) of the adapter."""
    return adapter_state(module, gather) if what == "adapter" else plain_state(module, gather)


def write_pretrained(
    module: nn.Module,
    state: Iterable[tuple[str, Tensor]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    what: Export = "model",
    ends: Sequence[int] = (),
) -> None:
    """Write `state` with the config of `module` as a folder that `from_pretrained` reads, Transformers' or PEFT's.

    `ends`: tokens that end an answer, as the module has learned; `generate` and vLLM stop where the folder's
    generation_config.json says, which gets them beside those that it names already.
    Weights are taken from `state` and written one file after the other; of models that Transformers writes in another
    form, and of adapters, all at once.
    """
    if what == "adapter":
        # False: by itself, PEFT asks the Hub whether the embeddings have grown.
        save_folder(folder, module, tokenizer, state_dict=_held(state), save_embedding_layers=False)
        return
    model = plain_model(module)
    with _no_progress_bar(), _described_as_exported(model), _stopping_at(model, tokenizer, ends):
        if not leaves_as_it_is(model):
            save_folder(folder, model, tokenizer, state_dict=_held(state))
            return
        save_folder(folder, model, tokenizer, state_dict={})  # first, for it deletes what looks like an earlier shard
        left_out = unsaved_names(model)
        write_weights(folder, ((name, tensor) for name, tensor in state if name not in left_out))
        follow_umask(folder)


def _held(state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu") for name, tensor in state}


def not_finite(weights: Iterable[tuple[str, Tensor]], folder: Path) -> str | None:
    """Why weights must not be written: a folder of such loads without a word, and answers nonsense. None: they may."""
    for name, tensor in weights:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return (
                f"weights are not finite (the first is {name}), so no model was written to {folder}: the training has "
                "diverged; go on from an earlier checkpoint (write its name, like step_100, into checkpoints/latest) "
                "with a lower learning rate"
            )
    return None


@contextmanager
def _described_as_exported(model: Any) -> Iterator[None]:
    """The model's config as it is without what only training needs."""
    kept, quantizer = copy.deepcopy(model.config), getattr(model, "hf_quantizer", None)
    try:
        if getattr(model.config, "use_cache", None) is False:
            # Off only because of gradient checkpointing; whoever generates with this folder wants the cache.
            model.config.use_cache = True
        if quantizer is not None:  # what leaves is not packed
            del model.config.quantization_config
            model.hf_quantizer = None
        yield
    finally:
        model.config.__dict__.update(kept.__dict__)
        if quantizer is not None:
            model.hf_quantizer = quantizer


@contextmanager
def _stopping_at(model: Any, tokenizer: PreTrainedTokenizerBase | None, ends: Sequence[int]) -> Iterator[None]:
    """The model's generation config with `ends`, which a classifier has no use for."""
    generation = getattr(model, "generation_config", None)
    if generation is None or tokenizer is None or not ends:
        yield
        return
    kept = dict(vars(generation))
    all_ends = tuple(dict.fromkeys([*with_named_ends(generation.eos_token_id, tokenizer), *ends]))
    generation.eos_token_id = list(all_ends) if len(all_ends) > 1 else all_ends[0]
    # Where it says so, versions before 5 make it anew from config.json, which knows of one end.
    generation._from_model_config = False
    try:
        yield
    finally:
        vars(generation).update(kept)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Saving is short; a bar of its own would tear the run's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
