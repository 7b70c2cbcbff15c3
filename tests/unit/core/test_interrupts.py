"""The first signal asks, the second one stops."""

from __future__ import annotations

import signal
import threading

import pytest

from dpo_cli.core.interrupts import graceful_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_one_stops(number: signal.Signals) -> None:
    with graceful_stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


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
