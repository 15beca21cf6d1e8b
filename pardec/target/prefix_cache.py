"""The key/value cache of training: a prefix that is run once, and rows behind it that are kept nowhere.

It gives every layer, sliding-window ones too, keys and values of full length; windows live in the attention mask.
Knows nothing of tokens or masks. Legend: B batch, H key/value heads, R rows of the forward, T real tokens, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Handing:
    """What a cache and its layers share, as `_Addressing` is of the other cache: neither keeps the other alive."""

    is_apart: bool = False
    prefix: tuple[Tensor, Tensor] | None = None
    room: int | None = None  # tokens that there will be, while the prefix comes in slices


class _PrefixLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, handing: _Handing):
        super().__init__()
        self.handing = handing
        self._buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.handing.room is not None:
            return self._appended(key_states, value_states, self.handing.room)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        # nothing is stored: a second forward against the same prefix, and its backward, must see the prefix alone
        if self.handing.is_apart:
            self.handing.prefix = self.keys, self.values
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def _appended(self, keys: Tensor, values: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """All keys and values so far, these behind those of slices before."""
        if self._buffers is None:
            # at once for all slices: buffers that grow are there twice while they are copied
            self._buffers = (
                keys.new_empty(*keys.shape[:2], room, keys.shape[3]),
                values.new_empty(*values.shape[:2], room, values.shape[3]),
            )
        begin = self.get_seq_length()
        end = begin + keys.shape[2]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, begin:end] = states
        of_keys, of_values = self._buffers
        self.lazy_initialization(of_keys[:, :, :end], of_values[:, :, :end])
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


class PrefixCache(Cache):
    """Holds what the first forward wrote, or those that fill it; later ones attend to that and to their own rows."""

    def __init__(self, num_layers: int):
        self._handing = _Handing()
        super().__init__(layers=[_PrefixLayer(self._handing) for _ in range(num_layers)])

    @contextmanager
    def filled_up_to(self, num_tokens: int) -> Iterator[None]:
        """Forwards add to the prefix, one behind the other, up to so many tokens, and attend to all that is there."""
        self._handing.room = num_tokens
        try:
            yield
        finally:
            self._handing.room = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Layers are given their own rows alone, and their attention takes the prefix by `prefix_of_layer`: no copy."""
        self._handing.is_apart = True
        try:
            yield
        finally:
            self._handing.is_apart, self._handing.prefix = False, None

    def prefix_of_layer(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer that has just handed in its rows, each of shape [B, H, T, D]; once.

        Raises:
            RuntimeError: if none has, as where a layer shares those of another.
        """
        prefix, self._handing.prefix = self._handing.prefix, None
        if prefix is None:
            raise RuntimeError("expected a layer that has handed in its own keys and values, found none")
        return prefix
