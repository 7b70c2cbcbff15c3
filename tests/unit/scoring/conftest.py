"""What several tests of the scoring room need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.core.training_params import LoraParams
from dpo_cli.models.adapters import add_adapter

VOCABULARY = 100


@pytest.fixture
def make_tuned(make_llama: Callable[..., Any]) -> Callable[..., Any]:
    """``make_tuned(lora, **changes)``: the same tiny llama each time, frozen, with an adapter that does something.

    It is in train mode.
    """

    def make(lora: LoraParams | None = None, **changes: Any) -> Any:
        frozen = make_llama(VOCABULARY, **changes).requires_grad_(False)
        model = add_adapter(frozen, lora or LoraParams(r=4), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        return model.train()

    return make
