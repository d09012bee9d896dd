from datetime import datetime

import pytest
import yaml

from rlhf_ray.config.clock import at_moment
from rlhf_ray.config.evaluation import EvalRunConfig
from rlhf_ray.config.load import dump_config, parse_config
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.config.supervised import SFTConfig
from rlhf_ray.errors import ConfigError

MOMENT = datetime(2030, 1, 2, 3, 4, 5)
BASE = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}}


def run(**changes) -> RunConfig:
    return parse_config({**BASE, **changes}, RunConfig, source="test")


def test_a_run_and_its_local_judges_get_the_moment():
    judges = [
        {"function": "judge", "args": {"model": "local"}},
        {"function": "judge", "name": "far", "args": {"model": "m", "endpoint": "http://h/v1"}},
        {"function": "judge", "name": "fixed", "args": {"model": "m", "clock": "2020-01-01T00:00:00"}},
        {"function": "keyword", "args": {"words": ["x"]}},
    ]
    dated = at_moment(run(rewards=judges), MOMENT)
    assert dated.clock == MOMENT
    clocks = [reward.args.get("clock") for reward in dated.rewards]
    assert clocks == ["2030-01-02T03:04:05", None, "2020-01-01T00:00:00", None]
    assert at_moment(SFTConfig(**BASE), MOMENT).clock == MOMENT
    judged = EvalRunConfig(models={"a": "m"}, data={"path": "d"}, judge={"model": "j"})
    assert at_moment(judged, MOMENT).judge.clock == MOMENT


def test_a_clock_that_is_set_stays_and_the_file_that_is_written_holds_it():
    own = run(rewards=[{"function": "judge", "args": {"model": "j"}}], clock="2020-05-06 07:08:09")
    dated = at_moment(own, MOMENT)
    assert dated.clock == datetime(2020, 5, 6, 7, 8, 9) and dated.rewards[0].args["clock"] == "2020-05-06T07:08:09"
    assert parse_config(yaml.safe_load(dump_config(dated)), RunConfig, source="test") == dated
    assert at_moment(dated, MOMENT) == dated


@pytest.mark.parametrize("value", ["yesterday", [], "2024-02-31"])
def test_what_is_no_moment_is_refused(value):
    with pytest.raises(ConfigError, match=r"clock: .*datetime"):
        run(rewards=[{"function": "keyword"}], clock=value)
