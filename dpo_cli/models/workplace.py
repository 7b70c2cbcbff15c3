"""Where a command computes: its machine, how much of it may be used, and who hears of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.models.device import Machine, token_budget
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.probe import Verdict, open_scorer
from dpo_cli.scoring.scorer import Scorer


@dataclass(frozen=True)
class Workplace:
    """Where a command computes.

    Attributes:
        command: Who works, for messages.
        reporter: Hears of the work.
        runtime: Layout, token budget, minutes of work that a kill may cost.
        machine: Device and compute dtype.
    """

    command: str
    reporter: Reporter
    runtime: RuntimeParams
    machine: Machine

    def scorer(self, model: Any) -> tuple[Scorer, Verdict]:
        """A model's log-probabilities, in the cheapest layout that is right for it.

        Raises:
            MachineError: The layout that is forced, or every layout, gives other numbers than the plain computation.
        """
        return open_scorer(model, self.machine.compute_dtype, self.runtime, self.reporter, self.command)

    def budget(self) -> TokenBudget:
        """Tokens that go through a model at once."""
        return TokenBudget(token_budget(self.runtime, self.machine.device), self.command, self.reporter)
