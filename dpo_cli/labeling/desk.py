"""The page's desk: raters' addresses, which stay the same from day to day, and the page behind them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.server import LOOPBACK, make_app, open_socket, serve

_NUM_BYTES = 18


def tokens_of(folder: Path, raters: Sequence[str]) -> dict[str, str]:
    """A secret for each rater, kept where nobody else on the machine reads it and no version control sees it.

    Args:
        folder: Of the votes.
        raters: Who.
    """
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
    return {rater: tokens[rater] for rater in raters}


class Desk:
    """The page of raters who have joined, on a port.

    Raises:
        MachineError: The port is taken.
    """

    def __init__(self, engine: Engine, raters: Sequence[str], port: int) -> None:
        self._listening = open_socket(port)
        self._port = self._listening.getsockname()[1]
        self._tokens = tokens_of(engine.folder, raters)
        self._app = make_app(engine, {token: rater for rater, token in self._tokens.items()}, self._port)

    def address(self, rater: str) -> str:
        """Where a rater votes."""
        return f"http://{LOOPBACK}:{self._port}/?token={self._tokens[rater]}"

    def serve(self) -> None:
        """Until Ctrl-C."""
        serve(self._app, self._listening)
