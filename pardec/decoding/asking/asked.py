"""How a call drafts: what is asked for, else what was tuned, else all that the adapter was trained with.

Knows numbers and the tuned choice; no model, and of the adapter its K.
Legend: K num_speculative_tokens, L copy_tokens.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pardec.adapters.tuned import TunedChoice
from pardec.arguments import integer, one_of
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.step import MODES
from pardec.decoding.verify import Verification
from pardec.draft_tree import MAX_RANK, AnyTree, DynamicTree
from pardec.errors import shown
from pardec.layout import (
    MAX_COPY_TOKENS,
    MAX_SPECULATIVE_TOKENS,
    PLAIN,
    BlockLengths,
    check_block_lengths,
    full_blocks,
)
from pardec.trees.drawing import most_nodes


@dataclass(frozen=True)
class Drafting:
    """How a call drafts.

    Attributes:
        mode: one of `MODES`; plain where nothing is drafted.
        block_lengths: of the fused chain, one for each copied token among them; for two_pass the largest counts alone,
            of a tree those behind the copies; (0,) for plain decoding.
        head: draws the drafts one after another; None to draw them from their rows as they are.
        verification: of drafts that were drawn.
        copy_tokens: copied ones that are verified behind the drafts, or beside the tree.
        tree: of candidates in place of the chain, as deep as the chain is long; its nodes are not drawn.
    """

    mode: str
    block_lengths: BlockLengths
    head: HeadDrafter | None
    verification: Verification = "token"
    copy_tokens: int = 0
    tree: AnyTree | None = None

    @property
    def num_speculative_tokens(self) -> int:
        """K; 0 where nothing of the adapter is used."""
        return max(self.block_lengths)


def drafting_for(
    mode: str | None,
    asked: int | None,
    block_lengths: Sequence[int] | None,
    use_head: bool | None,
    copy_tokens: int | None,
    *,
    trained: int | None,
    tuned: TunedChoice | None,
) -> tuple[str, BlockLengths, bool | None, int, AnyTree | None]:
    """Mode, block lengths, whether the head drafts (None where nothing says so), L and tree; all as in `generate`.

    Args:
        mode: one of `MODES`, or None.
        asked: K, or None.
        block_lengths: instead of K.
        use_head: or None.
        copy_tokens: L, or None.
        trained: K of the adapter; None without one.
        tuned: used where neither K nor block lengths are asked for, nor what it does not do: see `_serves`.

    Raises:
        ValueError: for what does not exist, or not together.
    """
    L, tree = _checked_copies(mode, copy_tokens), None
    L = 0 if mode == "plain" else L
    if tuned is not None and asked is None and block_lengths is None and _serves(tuned, mode, use_head, L):
        mode, blocks, tree = tuned.mode, tuple(tuned.block_lengths), tuned.tree
        use_head = False if use_head is None and not tuned.use_head else use_head
        if L is None:
            L = tuned.copy_tokens
        elif tuned.copy_tokens != L:  # with the same drafts, or where none were worth it alone
            mode, blocks = "fused" if mode == "plain" else mode, blocks[: max(blocks) + 1]
    else:
        mode, L = mode or "fused", L or 0
        is_given = block_lengths is not None
        blocks = _checked(mode, asked, block_lengths, L, trained) if is_given else _blocks_for(mode, asked, L, trained)
    if blocks == PLAIN and not L:
        return "plain", PLAIN, use_head, 0, None
    if mode == "fused":
        blocks = (*blocks, *(0,) * (max(blocks) + 1 + L - len(blocks)))
    return mode, blocks, use_head, L, tree


def _serves(tuned: TunedChoice, mode: str | None, use_head: bool | None, copy_tokens: int | None) -> bool:
    """Whether a choice is one of what is asked for, or None: a mode, drafts with or without a head, drafts at all."""
    drafts = max(tuned.block_lengths) > 0
    if mode not in (None, tuned.mode) or use_head not in (None, tuned.use_head if drafts else False):
        return False
    return drafts or mode in (None, "plain") or bool(tuned.copy_tokens if copy_tokens is None else copy_tokens)


def tree_for(
    mode: str | None,
    asked: int | None,
    block_lengths: Sequence[int] | None,
    copy_tokens: int | None,
    tree: AnyTree,
    *,
    trained: int | None,
    deepest: int | None,
) -> tuple[str, BlockLengths, int]:
    """Mode, block lengths, and L: those of the full chain that is as long as the tree is deep, then behind the copies.

    Args:
        mode: one of `MODES`, or None.
        asked: K, or None.
        block_lengths: or None.
        copy_tokens: L, or None.
        tree: that is asked for.
        trained: K of the adapter; None without one.
        deepest: K that its mask tokens allow; None for any.

    Raises:
        ValueError: for what is no tree, or does not go with one.
    """
    L, mode = _checked_copies(mode, copy_tokens) or 0, mode or "fused"
    if not isinstance(tree, AnyTree):
        raise ValueError(f"tree: expected a DraftTree or a DynamicTree, found {shown(tree)}")
    if mode == "plain" or asked is not None:
        raise ValueError("tree: expected mode fused or two_pass, and no num_speculative_tokens beside it")
    if trained is None:
        raise ValueError("tree: expected an adapter that drafts its nodes, found none")
    K = tree.num_speculative_tokens
    if deepest is not None and deepest < K:
        raise ValueError(
            f"tree: expected a depth of at most {deepest}, the number of distinct mask tokens that the adapter was "
            f"trained with, found {K}"
        )
    blocks = full_blocks(K) if mode == "two_pass" else (*full_blocks(K), *(0,) * L)
    return mode, blocks if block_lengths is None else _checked_beside(blocks, block_lengths, K), L


def _checked_beside(blocks: BlockLengths, block_lengths: Sequence[int], num_speculative_tokens: int) -> BlockLengths:
    """Block lengths that are asked for beside a tree, of which those behind copies are free; `blocks` = by default."""
    K, asked = num_speculative_tokens, None
    with suppress(TypeError, ValueError):
        asked = tuple(integer("block_lengths", length, 0, K) for length in block_lengths)
    if asked is None or asked[: K + 1] != full_blocks(K) or len(asked) > len(blocks):
        also = f" and up to {len(blocks) - K - 1} numbers from 0 to {K} behind its copied tokens"
        raise ValueError(
            f"block_lengths: expected {full_blocks(K)} beside a tree of depth {K}{also * (len(blocks) > K + 1)}, "
            f"found {shown(block_lengths)}"
        )
    return (*asked, *blocks[len(asked) :])


def _checked_copies(mode: str | None, copy_tokens: int | None) -> int | None:
    """L, of a mode that there is."""
    if mode is not None:
        one_of("mode", mode, MODES)
    return None if copy_tokens is None else integer("copy_tokens", copy_tokens, 0, MAX_COPY_TOKENS)


def check_ranks(tree: AnyTree, vocab_size: int, shortlist: int | None) -> None:
    """Refuses nodes of ranks that nothing has; `shortlist` of the sampler head that drafts, None without one.

    Raises:
        ValueError: naming how many tokens are ranked.
    """
    limit = vocab_size if shortlist is None else min(vocab_size, shortlist)
    what = "of the vocabulary" if shortlist is None else "on the sampler head's shortlist"
    if isinstance(tree, DynamicTree):
        ranked = limit if shortlist is not None else min(limit, MAX_RANK + 1)
        most = most_nodes(ranked, tree.num_speculative_tokens, tree.num_nodes)
        if most < tree.num_nodes:
            raise ValueError(
                f"tree: expected at most {most} nodes of the {ranked} tokens {what}, found {tree.num_nodes}"
            )
        return
    if max(tree.ranks) >= limit:
        raise ValueError(f"tree: expected ranks below {limit}, the tokens {what}, found {max(tree.ranks)}")


def _blocks_for(mode: str, asked: int | None, copy_tokens: int, trained: int | None) -> BlockLengths:
    if asked is not None:
        asked = integer("num_speculative_tokens", asked, 0, MAX_SPECULATIVE_TOKENS)
    if mode == "plain" or (asked == 0 and copy_tokens and mode == "fused"):
        return PLAIN
    if trained is None:
        also = " or num_speculative_tokens=0" if copy_tokens else ""
        raise ValueError(f"mode: expected plain{also}, the only one without an adapter, found {mode!r}")
    return full_blocks(trained if asked is None else asked)


def _checked(
    mode: str, asked: int | None, block_lengths: Sequence[int], copy_tokens: int, trained: int | None
) -> BlockLengths:
    try:
        blocks = tuple(integer("block_lengths", length, 0) for length in block_lengths)
    except TypeError:
        found = shown(block_lengths)
        raise ValueError(f"block_lengths: expected K + 1 numbers from 0 to K, found {found}") from None
    if mode != "fused" or asked is not None:
        raise ValueError("block_lengths: expected mode fused and no num_speculative_tokens beside it")
    # those behind copies may be left out, and are 0 then
    check_block_lengths(blocks, max(0, min(len(blocks) - 1 - max(blocks, default=0), copy_tokens)))
    if max(blocks) and trained is None:
        raise ValueError(f"mode: expected plain, the only one without an adapter, found {mode!r}")
    return blocks
