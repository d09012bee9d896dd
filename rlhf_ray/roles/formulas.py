"""The policy loss and the advantage of an algorithm, with their settings: built in, or what the user has written.

A user's own function is tried on a few numbers before anything is loaded, wherever it will be used: a mistake in it is
an error at the start, with its line, and not one after minutes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.policy_losses import ratio_stats
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.names import is_own
from rlhf_ray.config.user_code import find
from rlhf_ray.config.user_frames import frames_of_users
from rlhf_ray.errors import ConfigError

LOSS_ARGUMENTS = ("logp_BT", "old_BT", "adv_BT", "mask_BT")
ADVANTAGE_ARGUMENTS = ("reward_B", "group_B")


class Loss:
    """A policy loss whose settings are those of `algorithm`.

    Raises:
        ConfigError: the user's function cannot be found, called or learned from; says what to do.
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        facts = algorithm.loss_facts
        self.name, self.of_answers, self.is_own = algorithm.policy_loss, facts.of_answers, is_own(algorithm.policy_loss)
        self.stat_names: tuple[str, ...] = ()
        self.clips: Callable[[Tensor, Tensor], Tensor] | None = None
        if not self.is_own:
            self.function, self.options = facts.function, algorithm.options_of(facts.function)
            if facts.clips_function is not None:
                self.clips = partial(facts.clips_function, **algorithm.options_of(facts.clips_function))
            return
        self.function = _found(self.name, "policy_loss")
        self.options = _options(algorithm, self.function, "policy_loss", LOSS_ARGUMENTS)
        self._try()

    def __call__(
        self, logp_BT: Tensor, old_BT: Tensor, adv_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss_BT, what it says of each token beside it), 0 outside the mask."""
        if not self.is_own:
            return self.function(logp_BT, old_BT, adv_BT, mask_BT, **self.options), {}
        # Outside the mask there may be anything, -inf too; not everybody who writes a loss thinks of that.
        logp_BT, old_BT, adv_BT = (x.masked_fill(~mask_BT, 0.0) for x in (logp_BT, old_BT.detach(), adv_BT.detach()))
        returned = self.function(logp_BT, old_BT, adv_BT, mask_BT, **self.options)
        loss_BT, stats = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
        _require_shape(self.name, "the loss", loss_BT, mask_BT.shape)
        if not isinstance(stats, Mapping):
            raise ConfigError(
                f"loss {self.name!r} returned (loss_BT, {type(stats).__name__}); return loss_BT, or loss_BT and a "
                "dictionary of [B, T] tensors by name"
            )
        for name, value in stats.items():
            _require_shape(self.name, f"its number {name!r}", value, mask_BT.shape)
        zeroed = {name: value.detach().float().masked_fill(~mask_BT, 0.0) for name, value in stats.items()}
        return loss_BT.masked_fill(~mask_BT, 0.0), zeroed

    def stats(
        self, logp_BT: Tensor, old_BT: Tensor, mask_BT: Tensor, adv_BT: Tensor, own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Sums over the tokens of a micro-batch. `own`: what the call has said of each token."""
        stats = ratio_stats(logp_BT, old_BT, mask_BT, adv_BT, self.clips, of_answers=self.of_answers)
        if tuple(sorted(own)) != self.stat_names:  # the ranks add their numbers up, and would wait for each other
            raise ConfigError(
                f"loss {self.name!r} returned the numbers {sorted(own)}, and before {list(self.stat_names)}; return "
                "the same ones each time"
            )
        return stats | {f"policy_loss/{name}_sum": value.sum() for name, value in own.items()}

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Means over the tokens of a step, from sums as `stats` has them."""
        count = max(1.0, totals["count"])  # every answer of a step may be empty
        metrics = {"ratio/mean": totals["ratio_sum"] / count, "ratio/max": totals["ratio_max"]}
        if "clipped_sum" in totals:
            metrics["clipfrac"] = totals["clipped_sum"] / count
        return metrics | {f"policy_loss/{name}": totals[f"policy_loss/{name}_sum"] / count for name in self.stat_names}

    def _try(self) -> None:
        """The user's function on two answers of three tokens, one of them with a hole, together and one by one."""
        logp_BT = torch.tensor([[-1.0, -0.5, -2.0], [-0.7, -1.5, -0.2]], requires_grad=True)
        old_BT = torch.tensor([[-1.2, -0.5, -1.5], [-0.7, -9.0, -0.3]])
        adv_BT = torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]])
        mask_BT = torch.tensor([[True, True, True], [True, False, True]])
        rows = (logp_BT, old_BT, adv_BT, mask_BT)
        try:
            loss_BT, own = self(*rows)
            parts = [self(*(x[row : row + 1] for x in rows))[0] for row in range(2)]
            gradient_BT = torch.autograd.grad(loss_BT.sum(), logp_BT)[0] if loss_BT.requires_grad else None
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's function does
            raise _failed(self.name, "loss", LOSS_ARGUMENTS, self.options, error) from error
        if gradient_BT is None or not bool(gradient_BT[mask_BT].any()):
            raise ConfigError(
                f"loss {self.name!r} has no gradient at logp_BT, so nothing would be learned; compute it from logp_BT, "
                "without detach or torch.no_grad"
            )
        if not bool(torch.isfinite(loss_BT).all() and torch.isfinite(gradient_BT).all()):
            raise ConfigError(f"loss {self.name!r} is not finite for ordinary numbers: {loss_BT.tolist()}; mend it")
        if not torch.allclose(torch.cat(parts), loss_BT):
            raise ConfigError(
                f"loss {self.name!r} of an answer is another beside other answers, so it would depend on how a step is "
                "split into micro-batches; return a loss per token, and leave means to algorithm.aggregation"
            )
        self.stat_names = tuple(sorted(own))


class GroupAdvantage:
    """An advantage that is one number an answer, whose settings are those of `algorithm`. Raises as `Loss`."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.name, self.is_own = algorithm.advantage, is_own(algorithm.advantage)
        if not self.is_own:
            self.function = algorithm.advantage_facts.function
            self.options = algorithm.options_of(self.function)
            return
        self.function = _found(self.name, "advantage")
        self.options = _options(algorithm, self.function, "advantage", ADVANTAGE_ARGUMENTS)
        self._try()

    def __call__(self, reward_B: Tensor, group_B: Tensor, **more: Any) -> Tensor:
        """adv_B. `more`: arguments that only some of the built-in ones take."""
        adv_B = self.function(reward_B, group_B, **self.options, **more)
        if self.is_own:
            _require_shape(self.name, "the advantage", adv_B, reward_B.shape)
        return adv_B

    def _try(self) -> None:
        reward_B, group_B = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([3, 3, 7, 7])
        try:
            adv_B = self(reward_B, group_B)
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's function does
            raise _failed(self.name, "advantage", ADVANTAGE_ARGUMENTS, self.options, error) from error
        if not bool(torch.isfinite(adv_B).all()):
            raise ConfigError(f"advantage {self.name!r} is not finite for ordinary rewards: {adv_B.tolist()}; mend it")


def own_formulas(algorithm: AlgorithmConfig) -> dict[str, str]:
    """The loss and the advantage that the user has written: place -> how it will be called. Raises as `Loss`."""
    found = {}
    if is_own(algorithm.policy_loss):
        found[algorithm.policy_loss] = _call("loss", LOSS_ARGUMENTS, Loss(algorithm).options)
    if is_own(algorithm.advantage):
        found[algorithm.advantage] = _call("advantage", ADVANTAGE_ARGUMENTS, GroupAdvantage(algorithm).options)
    return found


def _found(place: str, setting: str) -> Callable[..., Any]:
    function = find(place, setting.removeprefix("policy_"))
    if not callable(function):
        raise ConfigError(f"algorithm.{setting}={place} is {function!r}, not a function; name a function")
    return function


def _options(
    algorithm: AlgorithmConfig, function: Callable[..., Any], setting: str, arguments: tuple[str, ...]
) -> dict[str, Any]:
    """The settings that a user's function takes by keyword: those of `algorithm` by their names, and its own."""
    given: Mapping[str, Any] = getattr(algorithm, f"{setting}_args")
    options = {**algorithm.options_of(function), **given}
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        own = f"; its own settings are algorithm.{setting}_args" + (f" ({', '.join(given)})" if given else "")
        raise ConfigError(
            f"algorithm.{setting}={getattr(algorithm, setting)} is called as f({', '.join(arguments)}, *, settings), "
            f"and it has {error}{own}"
        ) from error
    return options


def _call(kind: str, arguments: tuple[str, ...], options: Mapping[str, Any]) -> str:
    return f"{kind}({', '.join([*arguments, *(f'{name}={value!r}' for name, value in options.items())])})"


def _failed(
    place: str, kind: str, arguments: tuple[str, ...], options: Mapping[str, Any], error: Exception
) -> ConfigError:
    said = f"{kind} {place!r} failed when it was tried as {_call('f', arguments, options)}: "
    return ConfigError("\n  ".join([f"{said}{type(error).__name__}: {error}; mend it", *frames_of_users(error)]))


def _require_shape(place: str, what: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        is_one = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        needs = "a number for each token" if len(shape) == 2 else "a number for each answer"
        raise ConfigError(f"{place!r}: {what} is {is_one}; return a tensor of shape {list(shape)}, {needs}")
