"""What a run says while its workers load: a line a change, and who is waited for."""

from __future__ import annotations

from rlhf_ray.remote.calls import Call, Deadline, Worker
from rlhf_ray.remote.loading import Loading, title

SOON = Deadline(1.0, "none")


def test_only_changes_are_said_and_who_is_waited_for():
    lines, now = [], [100.0]
    names = ["learner rank 0", "learner rank 1", "generator 0", "reward"]
    workers = [Worker(name, actor=None) for name in names]
    loading = Loading(lines.append, workers, {"generator": "vllm", "learner": "deepspeed"}, clock=lambda: now[0])

    def done(index: int, seconds: float) -> None:
        now[0] = 100.0 + seconds
        loading.done(Call(workers[index], "build", lambda actor: None, SOON))

    assert lines == ["loading learner rank 0-1 (deepspeed), generator 0 (vllm), reward"]
    done(3, 2.0)
    assert lines[1:] == ["reward ready in 2 s; waiting for learner rank 0-1 (deepspeed), generator 0 (vllm)"]
    done(1, 9.0)
    done(1, 9.5)
    assert len(lines) == 2, "rank 0 is still loading"
    done(2, 31.4)
    assert lines[2:] == ["generator 0 (vllm) ready in 31 s; waiting for learner rank 0-1 (deepspeed)"]
    done(0, 40.0)
    assert lines[3:] == ["learner rank 0-1 (deepspeed) ready in 40 s"]
    done(2, 50.0)  # another call of a worker that is ready, as on shared GPUs
    assert len(lines) == 4


def test_twelve_workers_are_counted_as_numbers():
    names = [f"reference {i} rank {j}" for i in range(2) for j in range(3)]
    assert title(names, None) == "reference 0-1 rank 0-2" and title(["reward"], None) == "reward"
    assert title(sorted(f"generator {i}" for i in range(12)), "vllm") == "generator 0-11 (vllm)"
