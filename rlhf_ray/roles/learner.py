"""The policy that learns: log-probabilities, the policy update, and the way its weights leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_ray.algo.aggregation import loss_weights
from rlhf_ray.algo.corrections import importance_weights, mismatch_stats, mismatch_summary
from rlhf_ray.algo.kl import kl_estimate, kl_loss
from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.algo.schedules import linear
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.schema import LearnerConfig
from rlhf_ray.data.turn_end import turn_end_ids
from rlhf_ray.models.engine import TrainEngine
from rlhf_ray.models.lora import without_adapter
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.formulas import Loss
from rlhf_ray.roles.forward import Predictions, predict
from rlhf_ray.roles.protocols import WeightReceiver
from rlhf_ray.roles.sft_term import MicroLoss, SFTTerm
from rlhf_ray.roles.shared_prompts import MicroBatch, PromptSharing
from rlhf_ray.roles.training import Share, Step, Totals, TrainingRole
from rlhf_ray.sync.sender import WeightSender

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Learner(TrainingRole):
    """Trains the policy with a clipped, importance-weighted policy gradient.

    Of several ranks, each is given its own rows and the passes that it computes them in (`RankBatch`); a single process
    is given the whole batch.
    """

    config: LearnerConfig

    def __init__(
        self,
        engine: TrainEngine,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        max_new_tokens: int,
        sender: WeightSender,
        seed: int,
        total_steps: int,
        first_step: int = 0,
        sft: SFTTerm | None = None,
    ) -> None:
        """`sft`: what the policy learns beside its rollouts, where `algorithm.sft_coef` asks for it."""
        sharing = PromptSharing.of(engine.module) if config.share_prompts else None
        super().__init__(
            engine, config, seed=seed, total_steps=total_steps, aggregation=algorithm.aggregation,
            first_step=first_step, sharing=sharing,
        )  # fmt: skip
        self.algorithm = algorithm
        self.policy_loss = Loss(algorithm)
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.sender = sender
        self.sft = sft
        self.generators: WeightReceiver | None = None
        self.version = 0  # of the weights that were sent last

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] response log-probabilities under the current weights, at the sampling temperature."""
        return self.per_token(batch, lambda micro: self._predict(micro).logprobs())

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """[B, T] as `logprobs`, without the LoRA adapter: under the policy that the run began with."""
        with without_adapter(self.engine.module):
            return self.logprobs(batch)

    def _predict(self, micro: MicroBatch) -> Predictions:
        return predict(self.engine, micro, temperature=self.temperature, device=self.engine.device)

    def begin(self, step: int, kl_coef: float, streamed: bool = False) -> None:
        """Open a step; `learn` comes next, then `finish`.

        The rows that are learned from have `advantages`; `logp_old` may be missing when there is a single optimiser
        step, for then the policy that is updated is the old one; `logp_ref` is needed if the KL is measured.

        Args:
            step: 0, 1, ...: its place in the schedules of learning rate and entropy.
            kl_coef: weight of the KL term, where the algorithm puts it into the loss.
            streamed: `learn` is called with wave after wave of the step's rows, and one optimiser step follows in
                `finish`. The numbers are those of a step that has all rows at once, but for rounding. Nothing about a
                row may depend on rows of later waves: whitened advantages do.
        Raises:
            StepError: another step is open.
            ConfigError: `streamed`, and the config asks for several optimiser steps a step.
        """
        self.begin_step(step, self.loss_of(step, kl_coef), streamed)

    def loss_of(self, step: int, kl_coef: float) -> Callable[..., tuple[Tensor, Mapping[str, Tensor]]]:
        """`loss(micro, share, first_epoch=...)` of that step: what `begin` opens it with."""
        entropy_coef = linear(self.algorithm.entropy_coef, self.algorithm.entropy_coef_end, step, self.total_steps)
        return partial(self._loss, kl_coef=kl_coef, entropy_coef=entropy_coef)

    def more_losses(self, number: int, optimiser_step: int) -> Sequence[MicroLoss]:
        """The supervised rows of an optimiser step: by its place in the run, for a step may end early (`stop_kl`)."""
        if self.sft is None:
            return ()
        return self.sft.losses(self.engine, number * self.config.epochs * self.config.minibatches + optimiser_step)

    def is_far(self, stats: Totals) -> bool:
        """Whether the policy has moved far enough from the one before the passes; all ranks say the same.

        A minibatch is measured before its own optimiser step: the step that finds the policy too far is the last.
        Collective, where it can end the passes at all.
        """
        if self.config.stop_kl is None:
            return False
        totals = stats.over_ranks(self.engine)
        return totals["approx_kl_sum"] / max(1.0, totals["count"]) > self.config.stop_kl

    def _loss(
        self, micro: MicroBatch, share: Share, *, kl_coef: float, entropy_coef: float, first_epoch: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        algorithm, device = self.algorithm, self.engine.device
        mask_BT = micro.response_mask.to(device)
        predictions = self._predict(micro)
        logp_BT = predictions.logprobs()
        old_BT = logp_BT.detach() if micro.logp_old is None else micro.logp_old.to(device)
        # What wrote a given answer is unknown: it counts as this policy's own, and its ratio starts at 1.
        given_BT = micro.weight_version.to(device) < 0
        gen_BT = torch.where(given_BT, old_BT, micro.logp_gen.to(device))
        advantage_BT = micro.advantages.to(device)
        if advantage_BT.dim() == 1:
            advantage_BT = advantage_BT[:, None] * mask_BT
        with torch.set_grad_enabled(entropy_coef > 0):
            entropy_BT = predictions.entropies()

        policy_BT, own = self.policy_loss(logp_BT, old_BT, advantage_BT, mask_BT)
        policy_BT = policy_BT * self._correction(old_BT, gen_BT, mask_BT)
        weight_BT = loss_weights(
            mask_BT, self.aggregation,
            total_tokens=share.total_tokens, total_sequences=share.total_sequences, constant=self.max_new_tokens,
        )  # fmt: skip
        # The terms without their coefficients, also those that this loss does not have.
        parts = {
            "policy": (policy_BT * weight_BT).sum(),
            "kl": (self._kl(logp_BT, old_BT, micro) * weight_BT).sum(),
            "entropy": -(entropy_BT * weight_BT).sum(),
        }
        loss = parts["policy"]
        if micro.logp_ref is not None and algorithm.kl_in == "loss":
            loss = loss + kl_coef * parts["kl"]
        if entropy_coef > 0:
            loss = loss + entropy_coef * parts["entropy"]

        stats = {f"loss/{name}": value.detach() for name, value in parts.items()}
        stats["entropy_sum"] = entropy_BT.detach().sum()
        stats |= self.policy_loss.stats(logp_BT.detach(), old_BT, mask_BT, advantage_BT, own)
        if first_epoch:  # these compare policies that the inner epochs do not change
            own_BT = mask_BT & ~given_BT
            mismatch = mismatch_stats(old_BT, gen_BT, own_BT)
            stats |= {f"mismatch/{name}": value for name, value in mismatch.items()}
            if micro.logp_ref is not None:
                stats["kl_ref_sum"] = ((old_BT - micro.logp_ref.to(device)) * own_BT).sum()
                stats["sequences"] = own_BT.any(1).sum()
        return loss, stats

    def _kl(self, logp_BT: Tensor, old_BT: Tensor, micro: Batch) -> Tensor:
        """[B, T] KL to the reference at each token; without a reference 0, for then there is no such term."""
        if micro.logp_ref is None:
            return torch.zeros_like(logp_BT)
        ref_BT, estimator = micro.logp_ref.to(self.engine.device), self.algorithm.kl_estimator
        if self.algorithm.kl_in == "loss":
            return kl_loss(logp_BT, ref_BT, estimator, old_BT=old_BT)
        return kl_estimate(logp_BT.detach(), ref_BT, estimator)

    def _correction(self, old_BT: Tensor, gen_BT: Tensor, mask_BT: Tensor) -> Tensor | float:
        """Importance weights from the policy that generated to the one that learns."""
        algorithm = self.algorithm
        if algorithm.correction == "none":
            return 1.0
        return importance_weights(
            old_BT, gen_BT, mask_BT,
            level=algorithm.correction_level, mode=algorithm.correction,
            low=1 / algorithm.correction_cap if algorithm.correction == "mask" else 0.0, high=algorithm.correction_cap,
        )  # fmt: skip

    def metrics(self, totals: dict[str, float], step: Step) -> dict[str, float]:
        """By their final names; losses are averaged over the optimiser steps."""
        count, updates = max(1.0, totals["count"]), len(step.grad_norms)
        finite = [norm for norm in step.grad_norms if math.isfinite(norm)]
        metrics = {name: value / updates for name, value in totals.items() if name.startswith("loss/")}
        mismatch = {name.partition("/")[2]: value for name, value in totals.items() if name.startswith("mismatch/")}
        metrics |= {f"mismatch/{name}": value for name, value in mismatch_summary(mismatch).items()}
        metrics |= {
            "entropy": totals["entropy_sum"] / count,
            **self.policy_loss.metrics(totals),
            "approx_kl": totals["approx_kl_sum"] / count,
            "grad_norm": sum(finite) / len(finite) if finite else math.nan,
            "skipped_steps": float(updates - len(finite)),
            "lr": step.lr,
            **self.usage(totals),
        }
        if self.sft is not None:
            metrics["sft/tokens"] = totals["sft/tokens"]
        if "kl_ref_sum" in totals:
            metrics["kl_ref"] = totals["kl_ref_sum"] / max(1.0, totals["sequences"])
        if self.config.stop_kl is not None:
            metrics["optimiser_steps"] = float(updates)
        return metrics

    def connect(self, generators: WeightReceiver) -> None:
        """Say where `push_weights` sends to: one generator, or a client that fans out to several."""
        self.generators = generators

    def push_weights(self, version: int) -> dict[str, float]:
        """Send all weights to the generators as `version`. Collective.

        Raises:
            SyncError: a generator did not receive them whole.
            StepError: a step has begun and not ended.
        """
        self.require_no_step("push_weights")
        stats = self.sender.send(self.engine.export, self.generators, version)
        self.version = version
        return {"sync/gb_per_s": stats.gigabytes_per_second}

    @torch.no_grad()
    def canary_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of fixed sequences at temperature 1, to compare with a generator's. Collective."""
        rows = [torch.tensor(row, dtype=torch.long) for row in tokens]
        padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.engine.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.engine.device)
        mask_BT = torch.arange(padded_BT.shape[1], device=self.engine.device)[None, :] < lengths[:, None]
        logits_BTV = self.engine(input_ids=padded_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        logp_BT = token_logprobs(logits_BTV, padded_BT).cpu()
        return [logp_BT[i, : len(row)].tolist() for i, row in enumerate(rows)]

    def export_model(self, folder: Path) -> None:
        """A plain Hugging Face folder with the tokenizer, which says what ends a turn. Collective."""
        self.require_no_step("export_model")
        self.engine.save_pretrained(folder, self.tokenizer, ends=turn_end_ids(self.tokenizer))

    def export_adapter(self, folder: Path) -> None:
        """What LoRA has learned, as a folder that PEFT reads, with the tokenizer. Collective."""
        self.require_no_step("export_adapter")
        self.engine.save_pretrained(folder, self.tokenizer, "adapter")
