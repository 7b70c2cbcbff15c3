"""A model's own way from hidden states to logits, whatever it is, for any hidden states.

Legend: N rows, D hidden, V vocabulary.

The model's forward is called on one token, and a forward hook answers with the given hidden states
where the backbone would have given that token's. So what the model does behind its backbone is done
to them: further layers, scales, caps, a cut of the vocabulary. The hook lasts as long as the call.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.attention import Attending, attend
from dpo_cli.scoring.layout import lay_out


class NoAnswerError(Exception):
    """The model's forward does not take its hidden states from the backbone."""


class OwnHead:
    """What a causal model does behind its backbone.

    Args:
        causal: The model.
        backbone: The part of it that its forward calls for hidden states.
    """

    def __init__(self, causal: Any, backbone: torch.nn.Module) -> None:
        self._causal = causal
        self._backbone = backbone

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, V], differentiable in the hidden states and in what the model does to them.

        Raises:
            NoAnswerError: The backbone was not called, or gave something without hidden states.
        """
        answers: list[Any] = []

        def answer(_module: Any, _args: Any, output: Any) -> Any:
            answers.append(_with_first(output, hidden_ND[None]))
            return answers[-1]

        layout = lay_out([TokenGroup("", "", (1,), ((1,),))], "shared").to(hidden_ND.device)
        hook = self._backbone.register_forward_hook(answer)
        try:
            with attend(Attending(layout)):  # whichever attention the model has right now
                logits = self._causal(input_ids=layout.tokens_RT, use_cache=False).logits
        finally:
            hook.remove()
        if not answers:
            raise NoAnswerError(f"{type(self._causal).__name__} does not call its {type(self._backbone).__name__}")
        return logits[0].float()


def _with_first(output: Any, first: torch.Tensor) -> Any:
    """A backbone's output with another first part: its hidden states."""
    if isinstance(output, ModelOutput):
        name = next(iter(output))
        return type(output)(**{**output, name: first})
    if isinstance(output, tuple):
        return first, *output[1:]
    raise NoAnswerError(f"a backbone's output is a {type(output).__name__}")
