"""The key/value cache of decoding, whose slots are written per row.

It gives every layer, sliding-window ones too, keys and values of full length; windows live in the attention mask.
Knows nothing of tokens or masks. Legend: B batch, H key/value heads, R rows of the forward, S slots, D head size.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BufferKind = tuple[torch.device, torch.dtype, int, int]  # of keys or values: heads and their size


@dataclass
class _Addressing:
    """What a cache and its layers share; were it the cache itself, the two would keep each other, and their memory,
    alive until Python's cycle collector comes by."""

    num_slots: int
    num_used: int
    num_sequences: int | None
    slots: Tensor | None = None
    mask_rows: slice | Tensor | None = None
    # buffers of one kind lie in one store, [n, B, H, S, D], where it is known how many of them there will be
    expected: Counter[BufferKind] = field(default_factory=Counter)
    stores: list[Tensor] = field(default_factory=list)
    unused: dict[BufferKind, list[Tensor]] = field(default_factory=dict)

    def buffer_for(self, states: Tensor) -> Tensor:
        """Zeros for the states of a layer, shape [B, H, S, D]."""
        kind = _kind(states)
        if not self.unused.get(kind):
            B, (H, D) = self.num_sequences or states.shape[0], kind[2:]
            # zeros, not empty: a NaN in a masked value slot would still reach the output
            self.stores.append(states.new_zeros(max(self.expected[kind], 1), B, H, self.num_slots, D))
            self.unused[kind] = list(self.stores[-1].unbind(0))
        return self.unused[kind].pop(0)


def _kind(states: Tensor) -> BufferKind:
    return states.device, states.dtype, states.shape[1], states.shape[3]


class _SlotLayer(CacheLayerMixin):
    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self, owner: _Addressing):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self.owner.buffer_for(key_states)
        self.values = self.owner.buffer_for(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        slots, (B, _, R, _) = self.owner.slots, key_states.shape
        if self.owner.mask_rows is not None:
            _make_finite(key_states, self.owner.mask_rows)
            _make_finite(value_states, self.owner.mask_rows)
        if slots is None:  # prefill: rows 0..R-1 into slots 0..R-1, attention over the rows themselves
            self.keys[:B, :, :R] = key_states
            self.values[:B, :, :R] = value_states
            return key_states, value_states
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            _write(buffer, slots, states)
        num_used = self.owner.num_used
        return self.keys[:B, :, :num_used], self.values[:B, :, :num_used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.owner.slots is None else self.owner.num_used), 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        # as of transformers' own static caches a tensor; of the first sequence, where the others have other lengths
        return 0 if self.owner.slots is None else self.owner.slots[0, 0]

    def get_max_length(self) -> int:
        return self.owner.num_slots


def _write(buffer: Tensor, slots: Tensor, states: Tensor) -> None:
    """Puts states, shape [B, H, R, D], into the slots of the first B sequences of a buffer; slots of shape [B, R]."""
    B, H, _, D = states.shape
    if torch.compiler.is_compiling() or (buffer.is_cpu and B > 1):
        # into a part of the buffer, or by a scatter, compiled code writes by copying the whole buffer there and back; a
        # CPU's scatter in half precision does so too
        sequence = torch.arange(B, device=slots.device)[:, None]
        buffer[sequence, :, slots] = states.transpose(1, 2)
    elif B == 1:
        buffer[:1].index_copy_(2, slots[0], states)
    else:
        buffer[:B].scatter_(2, slots[:, None, :, None].expand(-1, H, -1, D), states)


def _make_finite(states: Tensor, rows: slice | Tensor) -> None:
    """Sets what is not finite in some rows to 0, in place: where attention gives a row no weight, 0 * NaN is NaN."""
    if isinstance(rows, slice):
        states[:, :, rows].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return
    last = states[:, :, states.shape[2] - rows.shape[1] :]
    finite = last.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    torch.where(rows[:, None, :, None], finite, last, out=last)


def aligned(num_keys: int, dtype: torch.dtype, device: torch.device) -> int:
    """At least so many keys that no row of attention's weights takes in another one.

    With AMX, oneDNN multiplies rows of bfloat16 whose length it cannot share out evenly as if the first numbers of the
    next row were theirs, times 0: behind the last real row stands a mask row, and of one without finite numbers that is
    NaN. Multiples of 64 are shared out evenly.
    """
    return -(-num_keys // 64) * 64 if device.type == "cpu" and dtype == torch.bfloat16 else num_keys


class SlotCache(Cache):
    """Preallocated keys and values whose slots are addressed per row, so that acceptance may be ragged.

    Attributes:
        num_slots: S, allocated for each row.
        num_used: slots 0..num_used-1 are what attention sees, so that its cost follows the used length.
        num_sequences: sequences to allocate for; None for those of the first forward.
        slots: None during prefill; before any other forward the slot of each row, shape [B, R], int64.
        mask_rows: before every forward the rows that hold mask tokens or nothing, a slice, flags of the last M rows,
            shape [B, M], or None: whatever they compute, their keys and values are made finite, so that they reach no
            row that does not attend to them.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_sequences: int | None = None,
        kinds: Mapping[BufferKind, int] | None = None,
    ):
        """Allocates nothing yet.

        Args:
            num_layers: of the model.
            num_slots: see the class.
            num_sequences: see the class.
            kinds: of another cache of the same model: then buffers of a kind lie side by side, and `move` takes a
                gather and a scatter for all of them.
        """
        self._here = _Addressing(num_slots, num_slots, num_sequences)
        self._here.expected.update(kinds or {})
        super().__init__(layers=[_SlotLayer(self._here) for _ in range(num_layers)])

    @property
    def num_slots(self) -> int:
        """S."""
        return self._here.num_slots

    @property
    def num_sequences(self) -> int | None:
        """See the class."""
        return self._here.num_sequences

    @property
    def num_used(self) -> int:
        """See the class."""
        return self._here.num_used

    @num_used.setter
    def num_used(self, num_used: int) -> None:
        self._here.num_used = num_used

    @property
    def slots(self) -> Tensor | None:
        """See the class."""
        return self._here.slots

    @slots.setter
    def slots(self, slots: Tensor | None) -> None:
        self._here.slots = slots

    @property
    def mask_rows(self) -> slice | Tensor | None:
        """See the class."""
        return self._here.mask_rows

    @mask_rows.setter
    def mask_rows(self, mask_rows: slice | Tensor | None) -> None:
        self._here.mask_rows = mask_rows

    @property
    def buffers(self) -> list[Tensor]:
        """Keys and values of every layer that has been written to, each of shape [B, H, S, D]."""
        found = [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]  # type: ignore[union-attr]
        return [buffer for buffer in found if buffer is not None]

    @property
    def kinds(self) -> Counter[BufferKind]:
        """How many buffers of each kind have been written to."""
        return Counter(map(_kind, self.buffers))

    def spread(self, source: Sequence[int], num_slots: int) -> None:
        """Row b takes the first `num_slots` slots of row `source[b]`: prompts that were run once serve several rows.

        Args:
            source: a row for each of up to `num_sequences` rows.
            num_slots: slots that are worth copying.
        """
        moves = [(row, origin) for row, origin in enumerate(source) if origin != row]
        buffers = self.buffers
        if not moves or not buffers:
            return
        device = buffers[0].device
        # from pinned memory, so that the host need not wait for the forward that is still under way
        rows, origins = torch.tensor(moves, pin_memory=device.type == "cuda").to(device, non_blocking=True).unbind(1)
        for buffer in buffers:
            # the selection is a copy, so rows may be read and overwritten in any order
            buffer[rows, :, :num_slots] = buffer[origins, :, :num_slots]

    def move(self, source: Tensor, target: Tensor) -> None:
        """What stands in slots `source` of each sequence comes to stand in its slots `target` as well.

        Positions are no matter of slots: keys are stored as attention takes them.

        Args:
            source: shape [B, n], int64.
            target: shape [B, n], int64, distinct in a sequence; may overlap with `source`.
        """
        B, n = source.shape
        for store in self._here.stores:
            if B == 1:
                store[:, :1].index_copy_(3, target[0], store[:, :1].index_select(3, source[0]))
                continue
            if store.is_cpu:  # in half precision its scatter copies the whole store
                sequence = torch.arange(B)[:, None]
                store[:, sequence, :, target] = store[:, sequence, :, source]
                continue
            shape = (store.shape[0], B, store.shape[2], n, store.shape[4])
            taken = store[:, :B].gather(3, source[None, :, None, :, None].expand(shape))
            store[:, :B].scatter_(3, target[None, :, None, :, None].expand(shape), taken)

    def take(self, other: "SlotCache", rows: Tensor) -> None:
        """Row `rows[b]` takes all slots of row b of a smaller cache of the same model; `rows` of shape [B], int64."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            assert isinstance(mine, _SlotLayer)
            assert isinstance(theirs, _SlotLayer)
            if theirs.keys is None or theirs.values is None:
                continue  # a layer that shares the keys and values of another
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            assert mine.keys is not None
            assert mine.values is not None
            mine.keys[rows, :, : other.num_slots] = theirs.keys
            mine.values[rows, :, : other.num_slots] = theirs.values

    def stretched(self, source: Tensor, num_slots: int, kinds: Mapping[BufferKind, int] | None = None) -> "SlotCache":
        """A cache of `num_slots` whose slot s holds what slot `source[s]` holds here; `source` of shape [n], int64.

        `kinds` as of any cache.
        """
        long = SlotCache(len(self.layers), num_slots, self.num_sequences, kinds)
        for layer, short in zip(long.layers, self.layers, strict=True):
            assert isinstance(layer, _SlotLayer)
            assert isinstance(short, _SlotLayer)
            if short.keys is None or short.values is None:
                continue  # a layer that shares the keys and values of another
            layer.lazy_initialization(short.keys, short.values)
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys[:, :, : source.shape[0]] = short.keys[:, :, source]
            layer.values[:, :, : source.shape[0]] = short.values[:, :, source]
        return long

    def states(self, layer_idx: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a layer has in its first slots, each of shape [B, H, num_slots, D]."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, _SlotLayer)
        assert layer.keys is not None
        assert layer.values is not None
        return layer.keys[:, :, :num_slots], layer.values[:, :, :num_slots]
