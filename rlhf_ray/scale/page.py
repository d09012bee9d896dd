"""A plan for people, and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rlhf_ray.config.redacted import legible
from rlhf_ray.scale.case import Case
from rlhf_ray.scale.devices import GIB
from rlhf_ray.scale.needs import Need, host_bytes, kv_tokens
from rlhf_ray.scale.planner import Option, Plan, warnings_of


def as_text(case: Case, plan: Plan, file: str | None) -> str:
    """`file`: the config, for the command that runs the plan."""
    config, best = case.config, plan.best
    lines = [
        f"# {legible(config.model.path)} ({_count(case.policy.parameters)} parameters), {config.algorithm.name}, on "
        f"{case.devices} x {case.device.name} ({case.device.memory / GIB:.0f} GiB; {case.nodes} "
        f"{'machine' if case.nodes == 1 else 'machines'})",
        f"a step: {config.rollout.prompts_per_step} prompts x {config.rollout.group_size} answers, on average "
        f"{case.prompt_tokens:g} + {case.answer_tokens:g} tokens" + _as_long_as_allowed(case),
    ]
    if plan.written is not None:
        option, wrong = plan.written
        lines += ["", f"as written: {_described(option)}", *(f"  does not fit: {problem}" for problem in wrong)]
        if not wrong:
            lines.append(f"  fits; {_cost(case, option)}")
    lines += ["", f"recommended: {_described(best)}", f"  {_cost(case, best)}"]
    lines += [f"  but {warning}" for warning in warnings_of(case, best.layout)]
    lines += ["", *_memory(case, best), ""]
    lines += [*_times(best), "", "why", *(f"  - {sentence}" for sentence in plan.why), "", "to run it"]
    settings = " ".join(f"{name}={_value(value)}" for name, value in best.layout.settings(config).items())
    lines.append(f"  rlhf-ray rl {file or 'CONFIG.yaml'} {settings}".rstrip())
    rates = case.rates
    lines += [
        "",
        f"assumed: {rates.train_mfu:.0%} of the peak in training, {rates.forward_mfu:.0%} in forward passes; "
        f"{rates.decode_bandwidth:.0%} of the memory's bandwidth when writing; {rates.network_gb_s:g} GB/s between "
        f"machines. Measure, and say so with --rates (docs/plan.md)",
    ]
    return "\n".join(lines)


def _as_long_as_allowed(case: Case) -> str:
    longest = case.answer_tokens == case.config.rollout.max_new_tokens
    return " (as if every answer were as long as allowed; --answer-tokens says otherwise)" if longest else ""


def _described(option: Option) -> str:
    layout = option.layout
    engine = layout.section("learner")["engine"]
    how = f"ZeRO-{layout.zero_stage}" if engine == "deepspeed" else "torch"
    how += f", offload {layout.offload}" if layout.offload != "none" else ""
    how += ", checkpointing" if layout.checkpointing else ""
    generators = f"{layout.generators} x {layout.tensor_parallel} generators"
    parts = [f"{layout.ranks} learner ranks ({how}, {layout.microbatch:,} tokens a pass)", generators]
    if layout.critic_ranks:
        parts.append(f"{layout.critic_ranks} critic ranks")
    parts += [name for name, there in (("reference", layout.reference), ("reward model", layout.reward)) if there]
    kind = "colocated (everybody takes turns)" if layout.colocated else "separate"
    return f"{kind}, {layout.devices} devices: {', '.join(parts)}"


def _cost(case: Case, option: Option) -> str:
    steps, hours = case.config.steps, option.device_hours
    money = case.rates.price_per_device_hour
    price = f", {steps * hours * money:,.0f} at {money:g} an hour" if money else ""
    return (
        f"{option.times.step:.3g} s a step, {steps} steps in {steps * option.times.step / 3600:.3g} h: "
        f"{steps * hours:.3g} device-hours{price}"
    )


def _memory(case: Case, option: Option) -> list[str]:
    lines = ["memory of a device, GiB"]
    for need in option.needs:
        parts = ", ".join(f"{name} {_gib(count)}" for name, count in need.parts.items() if count)
        lines.append(f"  {need.role:<18} {need.devices:>4} x  {_gib(need.total):>6} of {_gib(need.room):>6}: {parts}")
    lines.append(f"  each generator holds the keys and values of {kv_tokens(case, option.layout):,} tokens")
    host = host_bytes(case, option.layout)
    parts = ", ".join(f"{name} {_gib(count)}" for name, count in host.items() if count)
    return [*lines, f"  host, each machine:  {parts}"]


def _times(option: Option) -> list[str]:
    lines = ["time of a step, s"]
    for phase in option.times.phases:
        lines.append(f"  {phase.name:<14} {phase.seconds:>8.3g}  {phase.devices:>4} devices: {phase.why}")
    together = "generation overlaps with the rest" if option.times.overlapped else "one after the other"
    return [*lines, f"  {'step':<14} {option.times.step:>8.3g}  ({together})"]


def as_dict(case: Case, plan: Plan) -> dict[str, Any]:
    """For `--json`: bytes, seconds, device-hours."""
    written = None
    if plan.written is not None:
        option, wrong = plan.written
        written = {**_option(case, option), "does_not_fit": wrong}
    return {
        "model": {"path": legible(case.config.model.path), "parameters": case.policy.parameters,
                  "trained": case.policy.trained},
        "devices": {**asdict(case.device), "count": case.devices, "machines": case.nodes},
        "step": {"answers": case.rows, "prompt_tokens": case.prompt_tokens, "answer_tokens": case.answer_tokens},
        "recommended": {**_option(case, plan.best), "settings": plan.best.layout.settings(case.config)},
        "written": written,
        "why": plan.why,
        "rates": case.rates.model_dump(),
    }  # fmt: skip


def _option(case: Case, option: Option) -> dict[str, Any]:
    return {
        "layout": {**asdict(option.layout), "devices": option.layout.devices},
        "memory": [_need(need) for need in option.needs],
        "host_memory": host_bytes(case, option.layout),
        "warnings": warnings_of(case, option.layout),
        "kv_tokens": kv_tokens(case, option.layout),
        "phases": [asdict(phase) for phase in option.times.phases],
        "step_s": option.times.step,
        "device_hours_a_step": option.device_hours,
        "device_hours": option.device_hours * case.config.steps,
    }


def _need(need: Need) -> dict[str, Any]:
    return {"role": need.role, "devices": need.devices, "bytes": need.parts, "total": need.total, "room": need.room}


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _value(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
