import io

import pytest
from rich.console import Console

from rlhf_ray.run.progress import Progress, _duration


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_plain_lines_carry_reward_kl_speed_and_time_left(clock):
    console = plain_console()
    progress = Progress("grpo", 100, console=console, clock=clock)
    clock.now += 2.0
    progress.update(1, {"reward/mean": 0.25, "kl_ref": 0.0125, "perf/tokens_per_s": 12345.6, "loss/policy": 1})
    # 2 s for one step, 99 to go: 198 s; the line is longer than the console is wide and is not folded
    assert console.file.getvalue() == "grpo 1/100  reward 0.250  KL 0.0125  tok/s 12,346  3:18 left\n"


def test_a_log_file_gets_a_line_every_few_seconds_and_the_last_step(clock):
    console = plain_console()
    progress = Progress("sft", 30, console=console, every_s=5.0, clock=clock)
    for step in range(1, 31):
        clock.now += 1.0
        progress.update(step, {})
    steps = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert steps == ["1/30", "6/30", "11/30", "16/30", "21/30", "26/30", "30/30"]


def test_time_left_of_a_resumed_run_counts_only_its_own_steps(clock):
    console = plain_console()
    progress = Progress("grpo", 100, done=90, console=console, clock=clock)
    clock.now += 3.0
    progress.update(91, {})
    assert console.file.getvalue() == "grpo 91/100    0:27 left\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_samples_are_shown_as_they_are(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with Progress("grpo", 10, console=console) as progress:
        progress.update(3, {"reward/mean": 1.0})
        progress.show_samples(3, [("2+2=", "[bold]4[/]\nand more", 1.0), ("3+3=", "x" * 500, -0.5), ("a", "b", None)])
        progress.alarm("step 3: [/red] is no markup")
    text = console.file.getvalue()
    assert r"[bold]4[/]\nand more" in text and "1.000" in text and "-0.500" in text and "none" in text
    assert "x" * 500 not in text and "…" in text, "long completions are cut"
    assert "ALARM step 3: [/red] is no markup\n" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_samples_that_nobody_judges_have_no_reward(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with Progress("sft", 10, console=console) as progress:
        progress.update(3, {})
        progress.show_samples(3, [("2+2=", "4\n", None)], judged=False)
    text = console.file.getvalue()
    assert "none" not in text and "reward" not in text and r"4\n" in text


def test_a_terminal_gets_a_bar_and_gets_the_terminal_back():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress("grpo", 10, console=console)
    assert console.file.getvalue() == "", "nothing before the first step"
    progress.update(4, {"reward/mean": 0.5})
    progress.close()
    progress.close()
    text = console.file.getvalue()
    assert "4/10" in text and "reward 0.500" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_durations():
    assert [_duration(s) for s in (0.4, 59.6, 61, 3600, 100_000)] == ["0:00", "1:00", "1:01", "1:00:00", "27:46:40"]
