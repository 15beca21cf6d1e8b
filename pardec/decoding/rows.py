"""One forward of a layout's rows behind what is committed, with everything that makes it fast while it runs.

Knows layouts, the cache and the base; no drafts and no verification.
Legend: B batch, M mask rows, R rows, S cache slots, G query heads for each key/value head, V vocabulary,
H width of a hidden state.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.decoding.prepack import PackedLinears
from pardec.layout import RowLayout
from pardec.target.attention import AttentionRoute, group_rows, split_heads
from pardec.target.cache import SlotCache
from pardec.target.forward import FULL, TargetModel
from pardec.target.hidden import HiddenTap, rows_of_each


@dataclass(frozen=True)
class RowPlan:
    """A layout with the tensors that every forward of it needs, made once.

    Attributes:
        layout: on the target's device.
        mask_embeds: inputs of the mask rows, shape [1, M, D]; None without mask rows, or where noise stands there.
        mask_rows: where they stand.
        offsets: of the layout, shape [1, R]; here and below B in place of 1 where each sequence has a tree of its own.
        row_index: 0..R-1, shape [1, R].
        visible_by_kind: by kind of slot (0 committed, 1..R rows, R + 1 stale), shape [1, R + 2, R], bool.
        offset_by_kind: position of such a slot minus the committed length, shape [1, R + 2].
        bias_by_kind: what the attention route adds to the scores, [1, 1, G R, R + 2]; None for other attention.
    """

    layout: RowLayout
    mask_embeds: Tensor | None
    mask_rows: slice
    offsets: Tensor
    row_index: Tensor
    visible_by_kind: Tensor
    offset_by_kind: Tensor
    bias_by_kind: Tensor | None

    @property
    def has_mask_rows(self) -> bool:
        """Whether there are any."""
        return self.layout.num_real < self.layout.num_rows


@dataclass
class RowForward:
    """Runs plans on one target.

    Attributes:
        target: the frozen model.
        mask_embeddings: shape [K, D] in the target's dtype and device; None without mask tokens, or with noise.
        gate: LoRA at mask rows, or None.
        linears: packed weights, or None.
        query_group: G of the attention route; None for the model's own attention.
        compile_step: wraps the forward, such as `torch.compile`; None for none.
        noise: random tokens at mask rows; None for mask embeddings.
        tap: sees what the output head reads; None where nobody asks.
        hidden: what it saw in the last `run`, shape [B, R, H].
    """

    target: TargetModel
    mask_embeddings: Tensor | None = None
    gate: LoraGate | None = None
    linears: PackedLinears | None = None
    query_group: int | None = None
    compile_step: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    noise: NoiseTokens | None = None
    tap: HiddenTap | None = None
    hidden: Tensor | None = field(default=None, init=False)
    _slot_index: dict[int, Tensor] = field(default_factory=dict)  # 1..num_used by num_used, kept for graphs
    _compiled: dict[tuple[int, int, bool], Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        run = self.target.run if self.tap is None else _with_hidden(self.target.run, self.tap)
        self._run: Callable[..., Any] = run
        self._embed = self.target.base.get_input_embeddings()
        self._limit = self.target.max_positions
        # without windows what a row sees follows from the kind of slot alone
        self._mixes_windows = self.target.attention.layer_types != (FULL,)
        self._route = None if self.query_group is None else AttentionRoute(self.target.base)
        self._split_heads = split_heads(self.target.base, self.target.device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """What must be on the base while steps run, and acts inside of them only: hooks, packed weights."""
        with ExitStack() as stack:
            if self.tap is not None:
                stack.enter_context(self.tap.attached())
            if self.linears is not None:
                stack.enter_context(self.linears.installed())
            if self.gate is not None:
                # packed layers add their LoRA themselves
                packed, siblings = ((), ()) if self.linears is None else (self.linears.replaced, self.linears.siblings)
                stack.enter_context(self.gate.attached(but=packed, siblings=siblings))
            yield

    @property
    def held(self) -> object:
        """What steps read besides the base's own weights: whoever captures one keeps it alive."""
        return None if self.linears is None else self.linears.forwards

    def packed(self) -> AbstractContextManager[None]:
        """Inside `attached`, what makes forwards of this thread use the packed weights, if there are any."""
        return nullcontext() if self.linears is None else self.linears.active()

    def plan(self, layout: RowLayout) -> RowPlan:
        """The plan of `layout`."""
        layout = layout.to(self.target.device)
        R = layout.num_rows
        ones = torch.ones(1, R, dtype=torch.bool, device=layout.offsets.device)
        zero = layout.offsets.new_zeros(1)
        visible = torch.cat([ones, layout.visible.T, ~ones])
        mask_embeds = bias = None
        if layout.num_real < R and self.noise is None:
            assert self.mask_embeddings is not None
            mask_embeds = self.mask_embeddings[layout.mask_indices.to(self.mask_embeddings.device)][None]
        if self.query_group is not None and not self._mixes_windows:
            mask = group_rows(visible.T[None, None], self.query_group, self.target.dtype, self._split_heads)
            assert isinstance(mask, Tensor)
            bias = mask[:, :1].contiguous()
        return RowPlan(
            layout=layout,
            mask_embeds=mask_embeds,
            mask_rows=slice(layout.num_real, R),
            offsets=layout.offsets[None],
            row_index=torch.arange(R, device=layout.offsets.device)[None],
            visible_by_kind=visible[None],
            offset_by_kind=torch.cat([zero, layout.offsets, zero])[None],
            bias_by_kind=bias,
        )

    def block_inputs(self, lengths: Tensor, num_speculative_tokens: int) -> Tensor | None:
        """Inputs of one block of mask tokens behind `lengths` tokens, shape [B]: [K, D], with noise [B, K, D]."""
        if self.noise is None:
            return self.mask_embeddings
        depths = torch.arange(num_speculative_tokens, device=lengths.device)
        return self._embed(self.noise.at(lengths[:, None] + depths, depths))

    def run(self, plan: RowPlan, cache: SlotCache, lengths: Tensor, ids: Tensor) -> Tensor:
        """Logits of the plan's rows, shape [B, R, V].

        Args:
            plan: made here.
            cache: `num_used` slots of it are attended to.
            lengths: committed tokens, shape [B].
            ids: of the real rows, shape [B, num_real].
        """
        # [B, 1]; one length is broadcast as it is
        behind = lengths if lengths.shape[0] == 1 else lengths[:, None]
        positions = behind + plan.offsets
        if self.noise is not None and plan.has_mask_rows:
            noise = self.noise.at(positions[:, plan.mask_rows], plan.layout.mask_indices)
            ids = torch.cat([ids, noise], dim=1)
        embeds = self._embed(ids)
        if plan.mask_embeds is not None:
            embeds = torch.cat([embeds, plan.mask_embeds.expand(ids.shape[0], -1, -1)], dim=1)
        if self._limit is not None and cache.num_slots > self._limit:
            positions = self.target.clamp_positions(positions)
        mask = self._mask(plan, cache, behind, positions)
        cache.slots = behind + plan.row_index
        cache.mask_rows = plan.mask_rows if plan.has_mask_rows else None
        with ExitStack() as stack:
            if self.gate is not None and plan.has_mask_rows and self.compile_step is None:
                stack.enter_context(self.gate.open(plan.mask_rows, *embeds.shape[:2]))
            stack.enter_context(self.packed())
            if self._route is not None:
                stack.enter_context(self._route)
            forward = self._run if self.compile_step is None else self._compiled_for(plan)
            if self.tap is None:
                return forward(embeds, positions, mask, cache)
            logits, self.hidden = forward(embeds, positions, mask, cache)
            return logits

    def _compiled_for(self, plan: RowPlan) -> Callable[..., Any]:
        """The forward as `compile_step` makes it, which opens the gate by itself."""
        assert self.compile_step is not None
        is_packed = self.linears is not None and bool(self.linears.replaced)
        key = (plan.mask_rows.start, plan.mask_rows.stop, is_packed)
        if key not in self._compiled:
            run = self._run
            if self.linears is not None and is_packed:
                run = self.linears.around(run)
            if self.gate is not None and plan.has_mask_rows:
                run = self.gate.around(run, plan.mask_rows)
            self._compiled[key] = self.compile_step(run)
        return self._compiled[key]

    def _mask(self, plan: RowPlan, cache: SlotCache, behind: Tensor, positions: Tensor):
        """What the rows attend to, in the form that the attention takes."""
        if cache.num_used not in self._slot_index:
            self._slot_index[cache.num_used] = torch.arange(1, cache.num_used + 1, device=behind.device)
        # 0: committed, 1..R: rows of this forward, R + 1: stale
        kind = (self._slot_index[cache.num_used] - behind).clamp_(0, plan.layout.num_rows + 1)
        if plan.bias_by_kind is not None:
            return _bias(plan.bias_by_kind, kind, self._split_heads)
        kind, behind = kind.view(-1, cache.num_used), behind.view(-1, 1)
        attention = self.target.attention
        visible = _of_each(plan.visible_by_kind, kind).transpose(1, 2)
        slot = self._slot_index[cache.num_used] - 1
        key_positions = slot[None]
        if self._mixes_windows:
            key_positions = torch.where(kind == 0, slot, behind + _of_each(plan.offset_by_kind, kind))
        mask = attention.render(visible, positions, key_positions, self.target.dtype)
        if self.query_group is None:
            return mask
        return group_rows(mask, self.query_group, self.target.dtype, self._split_heads)


def _bias(by_kind: Tensor, kind: Tensor, num_kv_heads: int | None) -> Tensor:
    """The mask of kinds of slots, [S] or [B, S], as `group_rows` would make it of what is visible, in one launch."""
    if kind.dim() == 1:
        mask = by_kind.index_select(3, kind)
        return mask if num_kv_heads is None else mask.expand(-1, num_kv_heads, -1, -1)
    if num_kv_heads is None and by_kind.shape[0] == 1:
        return by_kind[0, 0][:, kind].transpose(0, 1)[:, None]
    kind = kind[:, None, None].expand(-1, num_kv_heads or 1, by_kind.shape[2], -1)
    return by_kind.expand(kind.shape[0], num_kv_heads or 1, -1, -1).gather(3, kind)


def _of_each(by_kind: Tensor, kind: Tensor) -> Tensor:
    """What a table [1 or B, R + 2] or [1 or B, R + 2, R] holds for kinds of slots, [B, S]: [B, S] or [B, S, R]."""
    if by_kind.shape[0] == 1:
        return by_kind[0][kind]
    return by_kind.gather(1, kind) if by_kind.dim() == 2 else rows_of_each(by_kind, kind)


def _with_hidden(run: Callable[..., Tensor], tap: HiddenTap) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run` that also returns what the tap saw: compiled code keeps to itself what its hooks have put aside."""

    def run_and_look(*args) -> tuple[Tensor, Tensor]:
        logits = run(*args)
        return logits, tap.hidden

    return run_and_look
