"""The catalogue of losses: which there are, which settings each reads, and where each comes from.

A loss enters it by :class:`Loss`, which stands above its function as a decorator. Settings are checked against it,
training computes what it names, and docs/objectives.md is made of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.losses.pairwise import Pairs

SETTINGS = (
    "label_smoothing",
    "gamma",
    "discopop_tau",
    "unlikelihood_alpha",
    "dpop_lambda",
    "rdpo_alpha",
    "beta_dpo_alpha",
    "alphapo_alpha",
    "rpo_eta",
    "desirable_weight",
    "undesirable_weight",
    "divergence",
    "ld_alpha",
    "weighting",
    "margin_scale",
    "ties",
)
"""Settings of section train that only some losses read."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class Loss:
    """An entry of the catalogue, and the decorator that makes it.

    Attributes:
        formula: With r = beta log(pi / ref) of an answer, w the chosen one, l the rejected one, m = r_w - r_l,
            e = label_smoothing.
        source: Paper and equation.
        use: When to use it.
        changed_by: Settings of section train that change its pairs, or what they count.
        needs: Settings that must not be at their default.
        has_reference: Whether the reference's log-probabilities are in it.
        compares: Whether it compares answers; a term on the chosen answer alone does not.
        learns_log_ratio: Whether the reward that it learns is beta log(pi / ref), summed over tokens.
        is_coupled: Whether one loss depends on all pairs of an optimizer step.
        is_ranking: Whether it is a loss of rankings, not of pairs.
        is_unpaired: Whether it is a loss of single answers that are good or bad, not of pairs.
        reads_scores: Whether it reads the answers' scores in the data.
        name: That of the function, and of the loss in ``train.loss``.
        function: What is compared (positional only), then settings of section train, to float64 [B].
    """

    formula: str
    source: str
    use: str
    changed_by: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    has_reference: bool = True
    compares: bool = True
    learns_log_ratio: bool = True
    is_coupled: bool = False
    is_ranking: bool = False
    is_unpaired: bool = False
    reads_scores: bool = False
    name: str = field(init=False)
    function: Callable[..., Tensor] = field(init=False)

    def __call__(self, function: _Function) -> _Function:
        """Enter a function into the catalogue, by its name."""
        self.name, self.function = function.__name__, function
        LOSSES[self.name] = self
        return function

    @property
    def settings(self) -> list[str]:
        """The settings that it computes with."""
        parameters = inspect.signature(self.function).parameters.values()
        return [each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY]

    @property
    def reads(self) -> tuple[str, ...]:
        """Settings of section train that it reads besides beta."""
        return (*(name for name in self.settings if name != "beta"), *self.changed_by)

    def of(self, pairs: Pairs, train: object) -> Tensor:
        """The losses of pairs, float64 [B].

        Args:
            pairs: What is compared.
            train: Has the settings as attributes: section train.
        """
        return self.function(pairs, **{name: getattr(train, name) for name in self.settings})


LOSSES: dict[str, Loss] = {}
"""By name; filled when :mod:`dpo_cli.losses` is imported."""


def readers(setting: str) -> list[str]:
    """The losses that read a setting."""
    return [name for name, entry in LOSSES.items() if setting in entry.reads]


def learns_log_ratio(losses: Iterable[str], divergence: str = "reverse_kl", ld_alpha: float | None = None) -> bool:
    """Whether beta log(pi / ref), summed over tokens, is the reward that a training with these settings learned.

    A term on the chosen answer alone, beside others, does not change which reward they learn.
    """
    comparing = [entry for name in losses if (entry := LOSSES.get(name)) is not None and entry.compares]
    ours = bool(comparing) and all(entry.has_reference and entry.learns_log_ratio for entry in comparing)
    return ours and divergence == "reverse_kl" and ld_alpha is None
