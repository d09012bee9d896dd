"""What a supervised run says of its rows before it starts: how many are held out, whether it can stop early, whether
the better answers are the longer ones, and whether good and bad ones count alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.config.supervised import DPOConfig, SupervisedConfig
from rlhf_ray.data.examples import LabelledAnswer, TokenizedPair
from rlhf_ray.data.length_balance import LengthBalance, length_balance


def notes_on_validation(
    config: SupervisedConfig, splits: Mapping[str, Sequence[Any]], steps_an_epoch: int
) -> list[str]:
    """Lines where validation is less than the settings ask for. `config.steps` is set."""
    notes, data, held_out = [], config.data, len(splits.get("val", ()))
    if 0 < held_out < data.eval_size:
        why = "the examples of one prompt go together" if data.eval_path is None else f"{data.eval_path} has no more"
        notes.append(f"held out: {held_out} examples, fewer than data.eval_size={data.eval_size}, for {why}")
    if config.eval.patience is None or config.steps is None:
        return notes
    every = config.eval.every or steps_an_epoch
    # The first validation is the best so far, and after the last step there is nothing to stop.
    first_stop = every * (config.eval.patience + 1)
    if first_stop >= config.steps:
        notes.append(
            f"eval.patience={config.eval.patience}: with a validation every {every} of {config.steps} steps "
            f"({math.ceil(config.steps / every)} in all) the run ends before it could stop early; lower eval.patience "
            "or set eval.every"
        )
    return notes


def balance_of(rows: Sequence[Any]) -> LengthBalance | None:
    """Lengths of the answers of training pairs, in learned tokens; None where the rows are no pairs."""
    pairs = [row for row in rows if isinstance(row, TokenizedPair)]
    return length_balance(((sum(pair.chosen.learned), sum(pair.rejected.learned)) for pair in pairs), "tokens")


def notes_on_labels(config: SupervisedConfig, rows: Sequence[Any]) -> list[str]:
    """KTO: how many answers are good and bad, and the weights under which both count about alike.

    (desirable weight x good) / (undesirable weight x bad) in [1, 4/3]: Ethayarajh et al. 2024, and TRL's warning.
    """
    if not isinstance(config, DPOConfig) or config.dpo.kind != "kto":
        return []
    good = sum(isinstance(row, LabelledAnswer) and row.good for row in rows)
    bad, loss = len(rows) - good, config.dpo
    said = f"answers: {good} good, {bad} bad"
    if not (good and bad):
        return [f"{said}; kto compares the two kinds, and with one alone it pushes all answers one way"]
    ratio = loss.desirable_weight * good / (loss.undesirable_weight * bad)
    if 1 - 1e-6 <= ratio <= 4 / 3 + 1e-6:
        return [said]
    low, high = (loss.undesirable_weight * bad / good * bound for bound in (1, 4 / 3))
    least, most = (loss.desirable_weight * good / bad / bound for bound in (4 / 3, 1))
    return [
        f"{said}; with these weights the good ones count {ratio:.2f} times as much as the bad ones, and 1 to 1.33 is "
        f"usual: dpo.desirable_weight {low:.2f} to {high:.2f}, or dpo.undesirable_weight {least:.2f} to {most:.2f}"
    ]
