"""The last layer's MLP on the positions that are read, and on no other.

Legend: T tokens of the row, P of them read, D hidden.

Behind the last layer's attention no position looks at another one, so what its MLP makes of a
position that predicts nothing is never read. Hooks take the P read positions out of what goes into
the MLP and put what comes out back among zeros. They act on what is attended (see ``attention.py``),
so a layer that is computed again in the backward pass does as it did, and do nothing otherwise.
"""

from __future__ import annotations

from typing import Any

import torch

from dpo_cli.scoring.attention import attending


class CannotSelectError(Exception):
    """An MLP is not called with, or does not give, a tensor of the row's positions."""


def last_mlp(backbone: Any) -> torch.nn.Module | None:
    """The MLP of a backbone's last layer; None where there is none of that name."""
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        return None
    mlp = getattr(layers[-1], "mlp", None)
    return mlp if isinstance(mlp, torch.nn.Module) else None


class ReadRows:
    """Hooks on an MLP, from :meth:`attach` to :meth:`detach`; several on one MLP do what one does."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        self._mlp = mlp
        self._hooks: list[Any] = []

    def attach(self) -> None:
        """Begin."""
        if not self._hooks:
            self._hooks = [
                self._mlp.register_forward_pre_hook(_take),
                self._mlp.register_forward_hook(_put_back),
            ]

    def detach(self) -> None:
        """End; the MLP is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _take(mlp: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """[1, T, D] to [1, P, D]."""
    state = attending()
    if state is None or state.read_P is None:
        return None
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].ndim != 3:
        raise CannotSelectError(f"{type(mlp).__name__} takes more than the row")
    hidden = args[0]
    if hidden.shape[1] != state.layout.num_tokens:
        return None  # taken already
    return (hidden.index_select(1, state.read_P),)


def _put_back(mlp: torch.nn.Module, _args: Any, output: Any) -> torch.Tensor | None:
    """[1, P, D] to [1, T, D]."""
    state = attending()
    if state is None or state.read_P is None:
        return None
    if not isinstance(output, torch.Tensor) or output.ndim != 3:
        raise CannotSelectError(f"{type(mlp).__name__} gives more than the row")
    if output.shape[1] != len(state.read_P):
        return None  # put back already
    whole = output.new_zeros(1, state.layout.num_tokens, output.shape[2])
    return whole.index_copy(1, state.read_P, output)
