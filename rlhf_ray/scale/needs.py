"""How much memory each role of a layout needs on a device, and what a device has for it. Formulas: models/memory.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_ray.models.memory import (
    activation_bytes,
    buffer_bytes,
    forward_bytes,
    kv_bytes_a_token,
    offloaded_bytes,
    train_parts,
)
from rlhf_ray.scale.case import Case
from rlhf_ray.scale.devices import GIB
from rlhf_ray.scale.layout import Layout

# vLLM profiles one pass of so many tokens before it gives the rest to keys and values (max_num_batched_tokens), and
# draws from the logits of all rows at once, in float32, of which it holds a few copies.
BATCHED_TOKENS, SAMPLED_COPIES = 8192, 4


@dataclass(frozen=True)
class Need:
    """Of one device of a role, or of all roles that share a device.

    Attributes:
        parts: what -> bytes.
        room: bytes that the device has for them.
    """

    role: str
    devices: int
    parts: dict[str, int] = field(default_factory=dict)
    room: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def needs_of(case: Case, layout: Layout) -> list[Need]:
    """One for each kind of device: of a colocated layout the fullest one, in each of its turns."""
    generator = _generator(case, layout)
    trained = {name: _trained(case, layout, name) for name in layout.trained}
    whole = _room(case)
    if not layout.colocated:
        needs = [Need("generator", layout.generators * layout.tensor_parallel, generator, _share(case, layout))]
        needs += [
            Need(name, layout.ranks if name == "learner" else layout.critic_ranks, {**held, **work}, whole)
            for name, (held, work) in trained.items()
        ]
        frozen = _frozen(case, layout)
        return needs + [Need(name, layout.devices_of(name), parts, whole) for name, parts in frozen.items()]
    resident = {f"{name} {part}": count for name, (held, _) in trained.items() for part, count in held.items()}
    resident |= {f"{name} weights": parts["weights"] for name, parts in _frozen(case, layout).items()}
    contexts = len(trained) + len(layout.frozen)  # the generator's own is in its share
    resident["other processes"] = int(contexts * case.rates.context_gib * GIB)
    turns = [("generating", generator), *((f"{name} at work", work) for name, (_, work) in trained.items())]
    turns += [(f"{name} at work", {"pass": parts["pass"]}) for name, parts in _frozen(case, layout).items()]
    needs = []
    for name, work in turns:
        # vLLM takes its share of the whole device, whoever else is there.
        taken = {"vLLM's share": int(layout.utilization * case.device.memory)} if name == "generating" else work
        needs.append(Need(name, layout.ranks, {**resident, **taken}, _colocated_room(case)))
    return [Need("generator's share", layout.ranks, generator, _share(case, layout)), *needs]


def _room(case: Case) -> int:
    """For one process that has the device for itself."""
    return int(case.device.memory * (1 - case.rates.reserve) - case.rates.context_gib * GIB)


def _colocated_room(case: Case) -> int:
    return int(case.device.memory * (1 - case.rates.reserve))


def _share(case: Case, layout: Layout) -> int:
    """vLLM's, without its own context."""
    return int(layout.utilization * case.device.memory - case.rates.context_gib * GIB)


def _generator(case: Case, layout: Layout) -> dict[str, int]:
    width, tensor_parallel = case.dtype.itemsize, layout.tensor_parallel
    sampled = SAMPLED_COPIES * 4 * case.config.generator.rows * case.shape.vocab // tensor_parallel
    return {
        "weights": case.policy.base * width // tensor_parallel,
        "pass": forward_bytes(case.shape, BATCHED_TOKENS, width, logits=False) // tensor_parallel + sampled,
        # The least that it can work with: keys and values of one sequence. Whatever its share leaves, it takes.
        "keys and values": case.longest * kv_bytes_a_token(case.shape, width, tensor_parallel),
    }


def kv_tokens(case: Case, layout: Layout) -> int:
    """Tokens whose keys and values one generator holds."""
    parts = _generator(case, layout)
    left = _share(case, layout) - parts["weights"] - parts["pass"]
    return max(0, left // kv_bytes_a_token(case.shape, case.dtype.itemsize, layout.tensor_parallel))


def _trained(case: Case, layout: Layout, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """(what stays on the device, what is there while it learns)."""
    settings = case.training(layout, name)
    size = case.policy if name == "learner" else case.critic
    parts = train_parts(size, settings, case.dtype)
    held = {part: parts[part] for part in ("weights", "optimiser")}
    tokens = max(layout.microbatch, case.longest)  # a longer row is a micro-batch of its own
    work = {
        "gradients": parts["gradients"],
        "activations": activation_bytes(
            case.shape, tokens, case.longest, case.dtype.itemsize,
            checkpointing=layout.checkpointing, logits=name == "learner",
        ),
        "buffers": buffer_bytes(size, settings, case.dtype),
    }  # fmt: skip
    return held, work


def _frozen(case: Case, layout: Layout) -> dict[str, dict[str, int]]:
    """Reference and judges: on each device a whole one, or a rank's part."""
    width, roles = case.dtype.itemsize, {}
    if layout.reference:
        tokens = max(layout.microbatch, case.longest)
        roles["reference"] = {
            "weights": case.policy.base * width // layout.reference_ranks,
            "pass": forward_bytes(case.shape, tokens, width),
        }  # fmt: skip
    if layout.reward:
        # Their shape is not known; their passes have no logits, and the policy's layer stands for theirs.
        roles["reward"] = {
            "weights": case.judges * width // layout.reward_ranks,
            "pass": forward_bytes(case.shape, max(layout.microbatch, case.longest), width, logits=False),
        }
    return roles


def host_bytes(case: Case, layout: Layout) -> dict[str, int]:
    """Host memory of the fullest machine: what is offloaded, sleeping generators, and each rank's model while it loads.

    Every rank loads the whole model in float32 first (roles/factory.py).
    """
    here = min(layout.ranks, case.device.in_a_node)
    parts = {"offloaded": 0, "loading": 0, "asleep": 0}
    for name in layout.trained:
        size = case.policy if name == "learner" else case.critic
        parts["offloaded"] += here * offloaded_bytes(size, case.training(layout, name), case.dtype)
    parts["loading"] = here * 4 * case.policy.parameters
    if layout.colocated:  # vLLM's first level of sleep keeps its weights in host memory
        # unpacked and without adapters, whatever the learner holds
        parts["asleep"] = here // layout.tensor_parallel * case.policy.base * case.dtype.itemsize
    return parts
