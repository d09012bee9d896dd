"""What a run directory keeps of each step beside its numbers, as an observer: completions, failures and alarms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.roles.batch import Rows
from rlhf_ray.roles.protocols import Scores
from rlhf_ray.run.directory import RunDirectory
from rlhf_ray.run.observer import Alarm, Observer, StepRecord


class Recorder(Observer):
    """Failed rewards and alarms to events.jsonl, the first `rollouts` completions of a step to rollouts/."""

    def __init__(self, directory: RunDirectory, rollouts: int) -> None:
        self.directory = directory
        self.rollouts = rollouts

    def step(self, record: StepRecord) -> None:
        for failure in record.failures:
            self.directory.event("reward_failed", **failure)
        judged = [row for row in record.samples if "reward" in row]  # a supervised run's are in its summary
        if self.rollouts and judged:
            self.directory.write_rollouts(record.step, judged[: self.rollouts])

    def alarm(self, alarm: Alarm) -> None:
        self.directory.event("alarm", kind=alarm.kind, reason=alarm.reason, step=alarm.step)


def rollout_rows(rows: Rows, scores: Scores, count: int, sources: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The first `count` completions of a step, as in rollouts/step_N.jsonl; with their sources, where there are any."""
    return [
        {
            "prompt_id": rows.prompt_id[i],
            **({"source": sources[i]} if sources else {}),
            "prompt": prompt,
            "completion": completion,
            "reward": float(scores.score[i]),
            "rewards": scores.of_row(i),
            "tokens": rows.response_lengths[i],
            "truncated": rows.truncated[i],
        }
        for i, (prompt, completion) in enumerate(scores.texts[:count])
    ]
