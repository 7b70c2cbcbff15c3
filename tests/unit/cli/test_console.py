"""What is printed where: notes to standard error, results to standard output, progress without a terminal as lines."""

from __future__ import annotations

import io
from time import sleep

import pytest
from rich.console import Console

from dpo_cli.cli import console
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.core.progress import Status


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_progress_is_a_line_an_interval_with_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ConsoleReporter().meter("train: training", 100, "steps") as meter:
        for _ in range(100):
            clock.now += 1
            meter.note("loss 0.5000")
            meter.advance(1)
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert out == ""
    assert len(lines) == 10
    assert lines[0] == "train: training: 10/100 steps, 1.0/s, 1 min 30 s left, loss 0.5000"
    assert lines[-1] == "train: training: 100/100 steps in 1 min 40 s, loss 0.5000"


def test_slow_work_says_how_long_one_takes_and_that_it_is_under_way(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_PLAIN_INTERVAL_S", 0.05)
    with ConsoleReporter().meter("train: training", 4, "steps") as meter:
        meter.note("measuring the held-out loss")
        sleep(0.5)
        meter.note("")
        clock.now += 17
        meter.advance(1)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "train: training: 0/4 steps, measuring the held-out loss"
    assert second == "train: training: 1/4 steps, 17 s a step, 51 s left"


def test_a_bar_tells_what_passed_from_what_is_left_in_one_line_of_100_columns() -> None:
    reporter = ConsoleReporter()
    screen = io.StringIO()
    reporter._notes = Console(file=screen, force_terminal=True, width=100, color_system=None)
    with reporter.meter("pretraining the embedded model", 150, "steps") as meter:
        sleep(0.02)
        meter.advance(2)
        sleep(0.02)
        meter.advance(2)
        meter.note("loss 7.3710")
    lines = [line for line in screen.getvalue().replace("\r", "\n").splitlines() if "loss 7.3710" in line]
    assert lines
    assert all(words in lines[-1] for words in ("pretraining the embedded model", "4/150 steps", "passed", "left"))


def test_bytes_are_told_in_units(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleReporter().meter("reading", 3 << 30, "bytes") as meter:
        clock.now += 20
        meter.advance(1 << 30)
    assert "1.0 GiB of 3.0 GiB, 51.2 MiB/s, 40 s left" in capsys.readouterr().err


def test_results_go_to_standard_output_and_notes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    reporter.say("a note [not markup]")
    reporter.warn("mind this")
    reporter.table("stage", [("figure", "1 [0, 2]")])
    out, error = capsys.readouterr()
    assert error.splitlines() == ["a note [not markup]", "warning: mind this"]
    assert "1 [0, 2]" in out


def test_no_table_is_printed_beside_json(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter(show_tables=False).table("stage", [("figure", "1")])
    assert capsys.readouterr().out == ""


def test_a_line_of_the_verdict_shows_its_color_with_and_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    rows: list[tuple[Status, str, str]] = [("bad", "form", "5%"), ("warn", "KL", "12"), ("good", "wins", "70%")]
    rows.append(("plain", "length", "1.0"))
    reporter.verdict("Tuning did harm: form.", "bad", rows)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["Tuning", "red", "amber", "green", "length"]
    screen = io.StringIO()
    reporter._results = Console(file=screen, force_terminal=True, color_system="standard")
    reporter.verdict("Tuning did harm: form.", "bad", rows)
    headline, form = [line for line in screen.getvalue().splitlines() if "form" in line]
    assert "\x1b[1;31m" in headline
    assert "\x1b[1;31mred" in form


HOSTILE = "\x1b[31m\x9b2J\u202e[/b]"
SPELLED_OUT = r"\x1b[31m\x9b2J\u202e[/b]"


def test_nothing_that_is_printed_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    reporter.say(f"{HOSTILE}\nnext")
    reporter.warn(HOSTILE)
    with reporter.meter(HOSTILE, 1, "rows") as meter:
        meter.advance(1)
    reporter.table(HOSTILE, [(HOSTILE, HOSTILE)])
    out, error = capsys.readouterr()
    assert not set("\x1b\x9b\u202e") & set(out + error)
    assert error.splitlines()[0] == rf"{SPELLED_OUT}\nnext"
    assert len(error.splitlines()) == 3
    assert out.count(SPELLED_OUT) == 3


def test_a_bar_shows_its_label_as_it_is() -> None:
    reporter = ConsoleReporter()
    screen = io.StringIO()
    reporter._notes._force_terminal = True
    reporter._notes.file = screen
    with reporter.meter(f"{HOSTILE} [bold]x[/]", 1, "rows") as meter:
        meter.note("[/nothing]")
        meter.advance(1)
    assert rf"{SPELLED_OUT} [bold]x[/]" in screen.getvalue()
    assert "\x9b" not in screen.getvalue()
