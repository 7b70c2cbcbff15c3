"""A cache of keys and values whose places stay: what CUDA can record a step on.

Legend: R rows, K places of the cache, G key heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer


class _Places(StaticLayer):
    """A layer's keys and values [R, G, K, D]; windows are the mask's, so that a token's place never changes.

    Attributes:
        place_1: int64 [1] on the device, the place of a step's token; None while prompts go through, from place 0 on.
    """

    def __init__(self, length: int, *, is_sliding: bool) -> None:
        super().__init__(length)
        self.is_sliding = is_sliding
        self.place_1: torch.Tensor | None = None
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values [R, G, tokens, D] in their places; returns all that may be seen."""
        if self.place_1 is None:
            size = key_states.shape[2]
            self.keys, self.values = (
                states.new_zeros(*states.shape[:2], self._length, states.shape[3])
                for states in (key_states, value_states)
            )
            self.keys[:, :, :size], self.values[:, :, :size] = key_states, value_states
            self.is_initialized = True
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.place_1, key_states)
        self.values.index_copy_(2, self.place_1, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is for, and the place of the first."""
        return (query_length if self.place_1 is None else self._length), 0

    def get_seq_length(self) -> Any:
        """Tokens before those that go through the model now: a number, and for steps a tensor []."""
        return 0 if self.place_1 is None else self.place_1[0]


class PlacesCache(Cache):
    """Keys and values of all layers in so many places, or a few more.

    Attributes:
        length: K.

    Raises:
        ValueError: A layer keeps what has no place.
    """

    def __init__(self, config: Any, length: int) -> None:
        self.length = -(-length // 8) * 8  # the kernels of attention read masks by eights
        self._places: list[_Places] = []
        for layer in StaticCache(config=config, max_cache_len=self.length).layers:
            if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
                raise ValueError(f"its cache has a {type(layer).__name__}")
            self._places.append(_Places(self.length, is_sliding=isinstance(layer, StaticSlidingWindowLayer)))
        super().__init__(layers=[*self._places])

    def begin_steps(self, place_1: torch.Tensor) -> None:
        """From now on single tokens go through the model, each to the place that this tensor holds then."""
        for layer in self._places:
            layer.place_1 = place_1
