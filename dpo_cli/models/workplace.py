"""Where a command computes: its machine, how much of it may be used, and who hears of the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.interrupts import graceful_stop
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.row_store import Keep, RowStore
from dpo_cli.models.device import Machine, token_budget
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.probe import LayoutChoice, open_scorer
from dpo_cli.scoring.scorer import Scorer


@dataclass(frozen=True)
class Workplace:
    """Where a command computes.

    Attributes:
        command: Who works, for messages.
        reporter: Told of the work.
        runtime: Layout, token budget, minutes of work that a kill may cost.
        machine: Device and compute dtype.
    """

    command: str
    reporter: Reporter
    runtime: RuntimeParams
    machine: Machine

    def scorer(self, model: Any) -> tuple[Scorer, LayoutChoice]:
        """A model's log-probabilities, in the cheapest layout that is right for it.

        Raises:
            MachineError: The layout that is forced, or every layout, gives other numbers than the plain computation.
        """
        return open_scorer(model, self.machine.compute_dtype, self.runtime, self.reporter, self.command)

    def budget(self) -> TokenBudget:
        """Tokens that go through a model at once."""
        return TokenBudget(token_budget(self.runtime, self.machine.device), self.command, self.reporter)

    @contextmanager
    def keeping(self, store: RowStore) -> Iterator[Keep]:
        """A function that takes rows and stores them every few minutes; it ends the work where the user asks for it.

        Raises:
            Interrupted: The user asked to stop; what was computed is kept, as it is after any error.
        """
        with graceful_stop() as stop, store.keeping(self.runtime.checkpoint_minutes) as keep:

            def kept(rows: Sequence[Mapping[str, Any]]) -> None:
                keep(rows)
                if stop.requested:
                    raise Interrupted(f"{self.command}: stopped; what was computed is kept, run it again to go on")

            yield kept
