"""The first signal asks, the second one stops."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from dpo_cli.core.interrupts import graceful_stop, heard, watched_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_one_stops(number: signal.Signals) -> None:
    with graceful_stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


class _Destroyed:
    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


def _in_a_destructor(number: signal.Signals) -> None:
    _Destroyed(number)


def _in_a_library(number: signal.Signals) -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(number)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX timers")
@pytest.mark.parametrize("swallow", [_in_a_destructor, _in_a_library])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_was_swallowed_comes_again_until_it_is_heard(
    swallow: Callable[[signal.Signals], None],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(unraisable.exc_type))
    with watched_stop():
        swallow(number)
        with contextlib.suppress(KeyboardInterrupt):  # and swallowed once more
            time.sleep(5)
            raise AssertionError("it did not come again")
        begun = time.monotonic()
        try:
            time.sleep(5)
        except KeyboardInterrupt as stop:
            heard(stop)
        assert time.monotonic() - begun < 4
        time.sleep(0.2)  # heard: nothing comes
    assert not said, "no traceback of what comes again"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX timers")
def test_a_stop_that_was_swallowed_before_a_loop_is_a_request_within_it() -> None:
    with watched_stop():
        _in_a_library(signal.SIGTERM)
        with graceful_stop() as stop:
            time.sleep(0.2)
            assert stop.requested


def test_a_request_at_which_nobody_looked_any_more_stops_at_the_end_of_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), graceful_stop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
    with graceful_stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_the_handlers_of_before_come_back_even_after_an_error() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), graceful_stop():
        assert [signal.getsignal(number) for number in numbers] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before


def test_in_another_thread_the_block_runs_without_handlers() -> None:
    seen: list[bool] = []

    def work() -> None:
        with graceful_stop() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
