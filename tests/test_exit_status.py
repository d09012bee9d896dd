"""What a command's exit status says: the table is whole, and who comes to it by which error."""

import pytest

from rlhf_ray import errors
from rlhf_ray.errors import EXIT_STATUS, RlhfRayError, StageError, exit_status


def test_every_error_is_in_the_table_by_itself():
    ours = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RlhfRayError)}
    assert ours - EXIT_STATUS.keys() == {RlhfRayError, StageError}


@pytest.mark.parametrize(("error", "status"), [
    (errors.ConfigError("x"), 2), (errors.DataError("x"), 3), (errors.RewardError("x"), 3),
    (errors.DivergenceError("x"), 4), (errors.WorkerError("x"), 75), (errors.ForeignError("a bug"), 1),
    (errors.StorageError("x"), 75),
    (errors.Terminated(), 130), (KeyboardInterrupt(), 130), (RuntimeError("a bug"), 1), (StageError("x", 4), 4),
    (type("Own", (errors.RewardError,), {})("x"), 3),
])  # fmt: skip
def test_the_nearest_class_decides(error, status):
    assert exit_status(error) == status


def test_help_says_it(rlhf_ray):
    status, out, _ = rlhf_ray("--help")
    assert status == 0 and "75 a worker, the cluster or the disk failed" in " ".join(out.split())
