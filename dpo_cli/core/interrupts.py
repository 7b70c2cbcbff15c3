"""Ctrl-C and SIGTERM: heard once, never lost, and in work that can be saved answered between two steps.

Python raises where the signal happens to find it. Inside a destructor, a callback or a library that catches everything
the exception is dropped, and the work would go on; so one that ends unheard is raised again.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_AGAIN_S = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    """Of this process."""

    is_watched = False
    asked = False
    lost: int | None = None


class _Stop(KeyboardInterrupt):
    """The user's wish to stop. While it unwinds something holds it; who drops it unheard has swallowed it."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum
        self.is_heard = False

    def __del__(self) -> None:
        if _State.is_watched and not self.is_heard:
            _State.lost = self.signum
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


def heard(error: BaseException) -> None:
    """Whoever catches a KeyboardInterrupt for good says so, or it comes again."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, _Stop):
            found.is_heard = True
        found = found.__context__


def stop_asked() -> bool:
    """Whether a signal has asked this process to stop."""
    return _State.asked


@contextmanager
def watched_stop() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise KeyboardInterrupt, again and again until it was :func:`heard`.

    A SIGINT that is ignored, as in a job of the background, stays so.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    if hasattr(signal, "setitimer"):  # not on Windows
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _raise_again)
        _State.is_watched = True
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, _Stop):  # which comes again: its traceback would tell of nothing
            report(unraisable)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report
        if _State.is_watched:
            _State.is_watched = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(signum: int, frame: FrameType | None) -> NoReturn:
    _State.asked = True
    raise _Stop(signum)


def _raise_again(signum: int, frame: FrameType | None) -> None:
    """Whoever handles the signal that was lost handles it now."""
    lost, _State.lost = _State.lost, None
    if lost is not None and callable(handler := signal.getsignal(lost)):
        handler(lost, frame)


class StopRequest:
    """Whether the user has asked to stop; the loop looks at it between two steps."""

    def __init__(self) -> None:
        self._requested = False
        self.is_answered = False
        """Whether somebody looked at the request, or it came when all was done."""

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        self.is_answered = self.is_answered or self._requested
        return self._requested

    @requested.setter
    def requested(self, value: bool) -> None:
        self._requested = value


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM asks to stop and the second one stops at once.

    Raises:
        KeyboardInterrupt: At its end, where the request came when nobody looked any more.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    asked_by: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if asked_by:
            _raise(signum, frame)
        asked_by.append(signum)
        _State.asked = request.requested = True

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked_by and not request.is_answered:
        raise _Stop(asked_by[0])
