"""A model folder out of a checkpoint, without its run: no Ray, no data, no other process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.sections import ModelConfig
from rlhf_ray.data.turn_end import turn_end_ids
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models.classifiers import head_names, load_classifier
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.models.lora import apply_lora, quantization
from rlhf_ray.models.pretrained import Export, exported_state, write_pretrained
from rlhf_ray.models.skeleton import Filled, skeleton
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.models.train_state import TrainState
from rlhf_ray.run.checkpoint import Checkpoints
from rlhf_ray.run.resume import BEGINNING
from rlhf_ray.run.storage import read_object, written_whole

Note = Callable[[str], None]
# The part of a checkpoint that becomes a model: of `rl`, and of `sft`, `rm`, `dpo` and `classifier`.
PARTS = ("learner", "trainer")


def merge(
    run: Path, step: int | None = None, out: Path | None = None, what: Export = "model", note: Note = print
) -> Path:
    """Write the model of a checkpoint as a plain Hugging Face folder; returns that folder.

    Args:
        run: the run's directory; a run that is still going on may be looked at, too.
        step: whose; None: of the newest whole checkpoint.
        out: a folder that is not there yet; None: RUN/merged/step_N, or RUN/merged/step_N-adapter.
        what: LoRA merged, or the adapter alone.
    Raises:
        RlhfRayError: there is no such checkpoint, it is damaged, or what it was made from is gone. An export that was
            cut off leaves OUT.unfinished, which the next one begins anew.
    """
    step, checkpoint = _checkpoint(run, step)
    tree = _settings(checkpoint)
    config = ModelConfig.model_validate(tree["model"])
    if what == "adapter" and config.lora is None:
        raise ConfigError(f"{run}: trained without model.lora, so there is no adapter; leave --adapter out")
    out = out or run / "merged" / (f"step_{step}" + "-adapter" * (what == "adapter"))
    if out.exists():
        raise ConfigError(f"{out}: is there already; name another folder with --out, or delete it")
    part = next((checkpoint / name for name in PARTS if (checkpoint / name).is_dir()), None)
    if part is None:
        raise CheckpointError(f"{checkpoint}: holds none of {', '.join(PARTS)}, so no model can be made of it")
    state = TrainState(part)
    made = run / "start"
    base = str(made if (made / "config.json").is_file() else config.path)
    tokenizer = load_tokenizer(
        made if made.is_dir() else config.tokenizer.path or config.path, trust_remote_code=config.trust_remote_code
    )
    note(f"step {step}: {len(state.trained) + len(state.fixed)} tensors of {state.meta['world_size']} "
         f"{'rank' if state.meta['world_size'] == 1 else 'ranks'} of {state.meta['engine']}")  # fmt: skip
    classifies = "rm" in tree or "classifier" in tree
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole("the model", out) as unfinished:
        ends = turn_end_ids(tokenizer) if what == "model" else ()
        if config.lora is not None and config.lora.quantize != "none":
            _unpacked(config, base, state, classifies, tree["seed"]).save_pretrained(unfinished, tokenizer, what, ends)
        else:
            module = skeleton(state, base, classifies=classifies, trust_remote_code=config.trust_remote_code)
            module = _adapted(module, config, classifies, tree["seed"])
            stream = exported_state(module, what, Filled(module, state))
            write_pretrained(module, stream, unfinished, tokenizer, what, ends)
    return out


def _checkpoint(run: Path, step: int | None) -> tuple[int, Path]:
    checkpoints = Checkpoints(run / "checkpoints")
    if step is not None and step not in checkpoints.steps():
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise CheckpointError(f"{run}: has no checkpoint of step {step}; it has: {there}")
    found = checkpoints.latest() if step is None else checkpoints.load(checkpoints.folder / f"step_{step}")
    if found is None:
        raise CheckpointError(f"{run}: has no checkpoint; name the directory of a run that has made one")
    return found[:2]


def _settings(checkpoint: Path) -> dict[str, Any]:
    tree = yaml.safe_load(read_object(checkpoint / BEGINNING).get("config") or "")
    if not isinstance(tree, dict) or "model" not in tree:
        raise CheckpointError(f"{checkpoint}: {BEGINNING} holds no settings; use a checkpoint of another step")
    return tree


def _adapted(module: Any, config: ModelConfig, classifies: bool, seed: int) -> Any:
    if (lora := config.lora) is None:
        return module
    heads = head_names(module) if classifies else ()
    return apply_lora(
        module, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, trained_modules=heads, seed=seed
    )


def _unpacked(config: ModelConfig, base: str, state: TrainState, classifies: bool, seed: int) -> TorchEngine:
    """Of QLoRA the checkpoint holds the adapter alone: the model that it began with is loaded and packed once more."""
    options = {**quantization(config.lora.quantize, state.dtype), "trust_remote_code": config.trust_remote_code}
    if classifies:
        shape = json.loads((state.folder / "config.json").read_text(encoding="utf-8"))
        labels = [shape["id2label"][str(number)] for number in range(len(shape["id2label"]))]
        model = load_classifier(base, labels=labels, pad_token_id=shape["pad_token_id"], seed=seed, **options)
    else:
        model = load_policy(base, **options)
    engine = TorchEngine(_adapted(model, config, classifies, seed), dtype=state.dtype)
    engine.load(state.folder)
    return engine
