"""Opens a labeling for people: their addresses, which stay the same from day to day, and the page behind them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.server import LOOPBACK, make_app, open_socket, serve

_NUM_BYTES = 18


@dataclass(frozen=True)
class Seat:
    """A rater's place.

    Attributes:
        rater: Who.
        num_torn: Bytes of a last vote that a kill had torn, and that were set aside.
        token: Says who he is.
    """

    rater: str
    num_torn: int
    token: str


def seat(engine: Engine, raters: Sequence[str]) -> list[Seat]:
    """Let people join, and find or draw their tokens.

    Raises:
        MachineError: One of them votes in another process already.
        DataError: A votes file is damaged, or of another mode.
    """
    torn = {rater: engine.join(rater).num_torn for rater in raters}
    tokens = _tokens(engine.folder, raters)
    engine.count_absent()
    return [Seat(rater, torn[rater], tokens[rater]) for rater in raters]


def _tokens(folder: Path, raters: Sequence[str]) -> dict[str, str]:
    """A secret for each rater, kept where nobody else on the machine reads it and no version control sees it."""
    path = paths.scratch_root() / "label" / f"{digest_bytes(str(folder.resolve()).encode())}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {str(name): str(token) for name, token in found.items()}
    except (OSError, ValueError, AttributeError):
        known = {}
    tokens = known | {rater: secrets.token_urlsafe(_NUM_BYTES) for rater in raters if rater not in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(tokens, file)
    os.replace(temporary, path)
    return tokens


class Desk:
    """The page of some raters, on a port.

    Raises:
        MachineError: The port is taken.
    """

    def __init__(self, engine: Engine, seats: Sequence[Seat], port: int) -> None:
        self._listening = open_socket(port)
        self._port = self._listening.getsockname()[1]
        self._app = make_app(engine, {each.token: each.rater for each in seats}, self._port)

    def address(self, seat: Seat) -> str:
        """Where a rater votes."""
        return f"http://{LOOPBACK}:{self._port}/?token={seat.token}"

    def serve(self) -> None:
        """Until Ctrl-C."""
        serve(self._app, self._listening)
