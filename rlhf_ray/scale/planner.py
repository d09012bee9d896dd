"""Chooses a layout: of all that the settings allow and the devices hold, the fastest; of about equal ones the
smallest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlhf_ray.errors import ConfigError
from rlhf_ray.scale.case import Case
from rlhf_ray.scale.devices import GIB
from rlhf_ray.scale.layout import ALONE, SHARED, Layout
from rlhf_ray.scale.needs import Need, host_bytes, needs_of
from rlhf_ray.scale.times import Times, times_of

# More devices must make a step shorter by this share, or fewer are recommended.
WORTH = 0.03
# From the simplest on: what is not needed is not recommended.
TRAINING = tuple(
    (stage, offload, checkpointing)
    for offload, stage, checkpointing in itertools.product(("none", "optimizer"), (2, 3), (False, True))
)
UTILIZATIONS = (SHARED, 0.25, 0.6)
MOST_DEVICES = 4096  # how far is looked for the number from which on a run fits


@dataclass(frozen=True)
class Option:
    """A layout that fits, and what it costs."""

    layout: Layout
    needs: list[Need]
    times: Times

    @property
    def device_hours(self) -> float:
        """Of one step."""
        return self.layout.devices * self.times.step / 3600


def fitting(case: Case) -> list[Option]:
    """Every layout that fits the devices, in no order; of the sizes of a micro-batch the largest one that does."""
    found = []
    for layout in _layouts(case):
        fits = _fitted(case, layout)
        if fits is not None:
            needs = needs_of(case, fits)  # on each device they do not depend on how many generators there are
            for generators in _generators(case, fits):
                one = replace(fits, generators=generators)
                found.append(Option(one, needs, times_of(case, one)))
    return found


def _fitted(case: Case, layout: Layout) -> Layout | None:
    """With the largest micro-batch that the devices hold."""
    passes = (replace(layout, microbatch=tokens) for tokens in _microbatches(case))
    return next((one for one in passes if not problems(case, one)), None)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    best: what is recommended.
    why: sentences.
    written: the config's own layout, and why it does not fit (empty: it does); None: there is none to speak of.
    """

    best: Option
    why: list[str]
    written: tuple[Option, list[str]] | None = None


def plan_of(case: Case, as_written: bool) -> Plan:
    """`as_written`: look at the config's own layout too.

    Raises:
        ConfigError: nothing fits; with numbers, and from how many devices on something would.
    """
    found = fitting(case)
    if not found:
        raise ConfigError(_refusal(case))
    best = choose(found)
    own = Layout.of(case.config)
    written = (Option(own, needs_of(case, own), times_of(case, own)), problems(case, own)) if as_written else None
    return Plan(best, reasons(case, best, found), written)


def choose(found: list[Option]) -> Option:
    """The fastest, or the smallest of those that are about as fast."""
    fastest = min(option.times.step for option in found)
    enough = [option for option in found if option.times.step <= fastest * (1 + WORTH)]
    least = min(option.layout.devices for option in enough)
    return min((option for option in enough if option.layout.devices == least), key=_rank)


def _rank(option: Option) -> tuple[float, ...]:
    """By time in steps of a hundredth, then by what a layout asks of the user beyond a plain one."""
    layout = option.layout
    return (round(math.log(option.times.step) / 0.01), layout.offload != "none", layout.zero_stage,
            layout.checkpointing, layout.tensor_parallel, -layout.microbatch, option.times.step)  # fmt: skip


def problems(case: Case, layout: Layout) -> list[str]:
    """Why a layout does not fit."""
    found = [
        f"{need.role}: {need.total / GIB:.1f} GiB on each of {need.devices}, which has room for "
        f"{max(0, need.room) / GIB:.1f}"
        for need in needs_of(case, layout)
        if not need.fits
    ]
    host = host_bytes(case, layout)
    asked = host["offloaded"] + host["asleep"]
    if asked > case.host_memory:
        found.append(f"host memory: {asked / GIB:.0f} GiB on a machine, which has {case.host_memory / GIB:.0f}")
    return found


def warnings_of(case: Case, layout: Layout) -> list[str]:
    """What may stop the run from starting, though it would fit once it runs."""
    loading = host_bytes(case, layout)["loading"]
    if loading <= case.host_memory:
        return []
    return [
        f"loading takes {loading / GIB:.0f} GiB of host memory on a machine, which has {case.host_memory / GIB:.0f} "
        "(--host-memory): each rank loads the whole model in float32 before its share is cut out"
    ]


def _layouts(case: Case) -> Iterator[Layout]:
    """Candidates with one generator and the longest micro-batches, without a look at memory."""
    config = case.config
    reference, reward = int(config.holds_reference), int(config.judging.needs_gpu)
    given, lora = config.generator.gpu_memory_utilization, config.model.lora
    quantized = lora is not None and lora.quantize != "none"
    for tensor_parallel in _tensor_parallel(case):
        for stage, offload, checkpointing in TRAINING:
            base = Layout(
                False, 1, tensor_parallel, 1, 0, reference, reward, stage, offload, checkpointing,
                _microbatches(case)[0], given or ALONE,
            )  # fmt: skip
            for ranks in (n for n in _counts(case.devices) if n <= case.rows):
                layout = replace(base, ranks=ranks, critic_ranks=ranks if config.uses_critic else 0)
                if quantized and layout.section("learner")["engine"] != "torch":
                    continue  # ZeRO cannot cut packed weights
                for replicas in sorted({1, -(-ranks // 4), -(-ranks // 2)}):
                    separate = replace(layout, **dict.fromkeys(layout.frozen, replicas))
                    if separate.devices <= case.devices and (layout.frozen or replicas == 1):
                        yield separate
                if ranks % tensor_parallel == 0 and not config.rollout.max_staleness:
                    layout = replace(layout, **dict.fromkeys(layout.frozen, ranks))
                    for utilization in UTILIZATIONS if given is None else (given,):
                        yield replace(
                            layout, colocated=True, utilization=utilization, generators=ranks // tensor_parallel
                        )


def _generators(case: Case, layout: Layout) -> list[int]:
    """How many there may be: of a colocated layout as many as its devices hold."""
    if layout.colocated:
        return [layout.generators]
    others = layout.devices - layout.tensor_parallel
    most = min(case.rows, (case.devices - others) // layout.tensor_parallel)
    return sorted({most, *_counts(most)})


def _counts(most: int) -> list[int]:
    """Powers of two, and three quarters of them, up to `most`."""
    powers = [1 << n for n in range(max(0, most).bit_length())]
    return sorted({n for power in powers for n in (power, power * 3 // 4) if 1 <= n <= most})


def _tensor_parallel(case: Case) -> list[int]:
    """What divides the attention heads, inside one machine."""
    most = min(case.devices, case.device.in_a_node)
    return [n for n in (1, 2, 4, 8) if n <= most and not case.shape.heads % n and not case.shape.mlp % n]


def _microbatches(case: Case) -> list[int]:
    """Tokens of a pass: what the config says, and less, down to one row."""
    given = case.config.learner.tokens_per_microbatch
    return sorted({max(case.longest, given >> n) for n in range(4)}, reverse=True)


def reasons(case: Case, best: Option, found: list[Option]) -> list[str]:
    """Why this layout and no other, in sentences."""
    layout, why = best.layout, []
    others = [option for option in found if option.layout.colocated != layout.colocated]
    names = ("colocated", "separate") if layout.colocated else ("separate", "colocated")
    if others:
        other = choose(others)
        why.append(
            f"{names[0]}: a step of {best.times.step:.3g} s on {layout.devices} devices; {names[1]} it would be "
            f"{other.times.step:.3g} s on {other.layout.devices}"
        )
    else:
        why.append(f"{names[0]}: no {names[1]} layout fits")
    why += _simpler(case, best)
    if layout.devices < case.devices:
        most = min((option.times.step for option in found), default=best.times.step)
        why.append(
            f"{layout.devices} of {case.devices} devices: with more a step is shorter by less than {WORTH:.0%} "
            f"({most:.3g} s at best), for {_limit(case, best)}"
        )
    longest = max(best.times.phases, key=lambda phase: phase.seconds)
    why.append(f"most of a step is {longest.name} ({longest.seconds / best.times.step:.0%}): {longest.why}")
    return why


def _simpler(case: Case, best: Option) -> list[str]:
    """What does not fit without each of the means that cost time or trouble."""
    layout = best.layout
    without = {
        "offload": replace(layout, offload="none") if layout.offload != "none" else None,
        "ZeRO-3": replace(layout, zero_stage=2) if layout.zero_stage == 3 and layout.ranks > 1 else None,
        "checkpointing": replace(layout, checkpointing=False) if layout.checkpointing else None,
        "tensor parallelism": replace(layout, tensor_parallel=1) if layout.tensor_parallel > 1 else None,
    }
    found = []
    for name, simpler in without.items():
        if simpler is not None:
            wrong = problems(case, simpler)
            found.append(f"{name}: without it {wrong[0]}" if wrong else f"{name}: a step is shorter with it")
    return found


def _limit(case: Case, best: Option) -> str:
    if best.layout.generators >= case.rows or best.layout.ranks >= case.rows:
        return f"a step has {case.rows} answers"
    return "what every device does for itself (reading weights, starting kernels) is not divided"


def _refusal(case: Case) -> str:
    what = (
        f"{case.policy.parameters / 1e9:.3g}B parameters do not fit {case.devices} x {case.device.name} "
        f"({case.device.memory / GIB:.0f} GiB each)"
    )
    wrong = _nearest(case)
    if wrong is None:
        return f"{what}: the reference, the critic or the judges take devices of their own, and none is left; name more"
    most = replace(case, devices=MOST_DEVICES)  # a device's share only shrinks where there are more
    if not _fits_somehow(most):
        return (
            f"{what}: {wrong}. More of them would not help ({_nearest(most)}): choose larger devices, shorter "
            "sequences, a smaller model or model.lora (a plan puts each reference and reward model whole on one "
            "device; a run can divide one, by reference.world_size or reward.world_size)"
        )
    count = 2 * case.devices
    while count < MOST_DEVICES and not _fits_somehow(replace(case, devices=count)):
        count *= 2
    return f"{what}: {wrong}. With {count} of them it fits; or choose larger devices, or model.lora"


def _fits_somehow(case: Case) -> bool:
    least = _microbatches(case)[-1]
    return any(not problems(case, replace(layout, microbatch=least)) for layout in _layouts(case))


def _nearest(case: Case) -> str | None:
    """What is wrong with the layout that lacks least."""
    layouts = list(_layouts(case))
    if not layouts:
        return None
    least = replace(min(layouts, key=lambda layout: _lack(case, layout)), microbatch=_microbatches(case)[-1])
    how = [f"{least.ranks} learner ranks", f"ZeRO-{least.zero_stage}", f"offload {least.offload}"]
    how += ["checkpointing"] if least.checkpointing else []
    how.append(f"generators of {least.tensor_parallel}")
    return f"even with {', '.join(how)}: {'; '.join(problems(case, least))}"


def _lack(case: Case, layout: Layout) -> int:
    """Bytes that are missing, of all roles and of the host."""
    lacks = [need.total - need.room for need in needs_of(case, replace(layout, microbatch=_microbatches(case)[-1]))]
    host = host_bytes(case, layout)
    lacks.append(host["offloaded"] + host["asleep"] - case.host_memory)
    return sum(max(0, lack) for lack in lacks)
