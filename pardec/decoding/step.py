"""The step: one forward that drafts, verifies and commits, with all state in tensors on the device.

Knows token ids only: no tokenizer, no files, no loop. `plain` is the same step without drafts and touches no adapter.
Legend: B batch, P padded prompt length, K num_speculative_tokens, L copy_tokens, W = K + L candidates, of a tree its
N nodes, R rows of a forward, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pardec.decoding.copying import Candidates, Copier
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.prefill import prefill_prompts, prompt_groups
from pardec.decoding.rows import RowForward, RowPlan
from pardec.decoding.sampling import TokenLaw, likeliest
from pardec.decoding.state import DecodeState
from pardec.decoding.verify import Verification, verify_copies, verify_greedy, verify_sample
from pardec.draft_tree import AnyTree, DynamicTree
from pardec.layout import block_layout, chain_layout, full_blocks, next_blocks, real_layout, tree_layout
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel
from pardec.target.hidden import rows_of_each
from pardec.target.placement import is_offloaded
from pardec.trees.dynamic_steps import DynamicSteps
from pardec.trees.standing import StandingTree
from pardec.trees.tree_steps import TreeSteps, compact
from pardec.trees.walk import Walk

MODES = ("plain", "two_pass", "fused")


@dataclass
class Decoder:
    """Decodes batches of prompts with one target, one set of mask tokens and one law.

    Attributes:
        forward: runs rows, K mask tokens among them.
        mode: one of `MODES`.
        num_speculative_tokens: K; 0 in plain mode, or where copies alone are verified.
        law: how tokens are chosen.
        max_new_tokens: limit per row.
        eos_token_ids: shape [n], may be empty.
        block_lengths: of the fused chain, W + 1 numbers in 0..K; default K behind the drafts, 0 behind the copies.
        head: draws the drafts one after another by what the tap of `forward` sees; None to draw them from their rows
            as they are.
        verification: of drafts that were drawn.
        copy_tokens: L.
        tree: of candidates in place of chain and copies, K deep; then `block_lengths` do not count.
        is_recorded: steps are recorded, to be run again on other numbers: they must not go by any.
    """

    forward: RowForward
    mode: str
    num_speculative_tokens: int
    law: TokenLaw
    max_new_tokens: int
    eos_token_ids: Tensor
    block_lengths: Sequence[int] | None = None
    head: HeadDrafter | None = None
    verification: Verification = "token"
    copy_tokens: int = 0
    tree: AnyTree | None = None
    is_recorded: bool = False
    _plans: dict[str, RowPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.head is None) == (self.forward.tap is None)
        K, L = self.num_speculative_tokens, self.copy_tokens
        blocks = tuple((*full_blocks(K), *(0,) * L) if self.block_lengths is None else self.block_lengths)
        layouts = {"step": chain_layout(blocks), "verify": real_layout(K + L + 1)}
        if self.tree is not None:
            assert (self.tree.num_speculative_tokens, L) == (K, 0)
            runs = self.tree.runs
            # where parents are data, rows are as if all nodes were the root's children until a step knows better
            parents = (0,) * self.num_drafts if isinstance(self.tree, DynamicTree) else self.tree.parents
            layouts = {"step": tree_layout(parents, runs), "verify": tree_layout(parents, [0] * len(runs))}
        layouts["draft"] = block_layout(K)
        del layouts["step" if self.mode == "two_pass" else "verify"]
        self._plans = {name: self.forward.plan(layout) for name, layout in layouts.items()}
        self._tree: TreeSteps | DynamicSteps | None = None
        plan = self._plans["verify" if self.mode == "two_pass" else "step"]
        if isinstance(self.tree, DynamicTree):
            self._tree = DynamicSteps.of(self.tree, plan)
        elif self.tree is not None:
            self._tree = TreeSteps.of(self.tree, plan)
        device = self.target.device
        self._next_block = next_blocks(blocks, len(blocks) - 1 - K).to(device)
        self._copier = Copier(K + L, device) if L else None
        self._token_index = torch.arange(self.tokens_per_step, device=device)
        self._walk_index = self._token_index[: K + 1]

    @property
    def target(self) -> TargetModel:
        """The frozen model."""
        return self.forward.target

    @property
    def rows_per_step(self) -> int:
        """Rows of the forwards of a step, summed."""
        names = ("draft", "verify") if self.mode == "two_pass" else ("step",)
        return sum(self._plans[name].layout.num_rows for name in names)

    @property
    def num_drafts(self) -> int:
        """Drafted tokens that a step verifies: K, or the nodes of the tree."""
        return self.num_speculative_tokens if self.tree is None else self.tree.num_nodes

    @property
    def tokens_per_step(self) -> int:
        """The most tokens that a step may emit."""
        return self.num_speculative_tokens + self.copy_tokens + (2 if self.mode == "two_pass" else 1)

    @property
    def num_slots_per_step(self) -> int:
        """Cache slots that a step writes behind the committed tokens."""
        return 1 + max(plan.layout.num_rows for plan in self._plans.values())

    def num_slots(self, prompt_tokens: int) -> int:
        """Cache slots that a sequence needs whose prompt has `prompt_tokens` tokens."""
        return prompt_tokens + self.max_new_tokens + self.num_slots_per_step

    @torch.no_grad()  # not around a loop: what the caller does between two steps keeps its gradients
    def prefill(
        self,
        prompts: list[list[int]],
        *,
        repeats: int = 1,
        num_unused: int = 0,
        cache: SlotCache | None = None,
        capacity: int | None = None,
        num_cached: int = 0,
    ) -> DecodeState:
        """Runs the prompts, in fused mode with one block of mask tokens behind each, and emits the first token.

        Args:
            prompts: lists of token ids, none empty.
            repeats: sequences that continue each prompt, next to each other; the prompt is run once for all.
            num_unused: further rows of the batch, done from the beginning.
            cache: to be written into; default one for B = len(prompts) repeats + num_unused sequences.
            capacity: new tokens that the state can hold; default `max_new_tokens`.
            num_cached: tokens at the beginning of every prompt whose keys and values `cache` holds already.
        """
        device, K = self.target.device, self.num_speculative_tokens
        source = [prompt for prompt in range(len(prompts)) for _ in range(repeats)] + [0] * num_unused
        B, P = len(source), max(len(prompt) for prompt in prompts)
        # all that the device is told, it is told before it has anything to do that the host would wait for
        rows = torch.tensor(source, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = torch.tensor([prompt + [0] * (P - len(prompt)) for prompt in prompts], device=device)
        cache = cache or SlotCache(self.target.num_layers, self.num_slots(P), B)
        logits = self._prefill_logits(padded, lengths, cache, num_cached)
        hidden = self._block_hidden()
        if len(prompts) < B:
            cache.spread(source, P + K)
            padded, lengths, logits = padded[rows], lengths[rows], logits[rows]
            hidden = None if hidden is None else hidden[rows]
        state = DecodeState.begin(
            cache,
            padded,
            lengths,
            self.eos_token_ids,
            room=torch.where(torch.arange(B, device=device) < B - num_unused, self.max_new_tokens, 0),
            drafts=lengths.new_zeros(B, self.num_drafts),
            draft_length=K,
            draft_probs=logits.new_zeros(B, K, logits.shape[2]).float() if self._draws_drafts else None,
            parents=lengths.new_zeros(B, self.num_drafts) if isinstance(self.tree, DynamicTree) else None,
            width=self.tokens_per_step,
            capacity=capacity or self.max_new_tokens,
            copies=self.copy_tokens > 0,
        )
        first = self._choose(state, logits[:, :1], state.drafts[:, :0])
        if self.mode == "fused" and K:
            self._draft(state, logits[:, 1:], hidden, first[:, 0])
        state.emit(torch.cat([first, state.tokens[:, 1:]], dim=1), torch.zeros_like(lengths), self._token_index)
        return state

    @property
    def _draws_drafts(self) -> bool:
        return self.num_speculative_tokens > 0 and not self.law.greedy and self.tree is None

    def _prefill_logits(self, padded: Tensor, lengths: Tensor, cache: SlotCache, num_cached: int = 0) -> Tensor:
        """Logits of each prompt's last token and, in fused mode, of the block behind it: shape [B, 1 (+ K), V]."""
        # on a CPU padding costs time; weights that every forward has to bring in cost more
        apart = padded.is_cpu and not is_offloaded(self.target.base)
        groups = [torch.tensor(group) for group in prompt_groups(lengths.tolist())] if apart else []
        if len(groups) < 2:
            return self._prefill_group(padded, lengths, cache, num_cached)
        logits, hidden = [], []
        for group in groups:
            longest = int(lengths[group].max())
            own = SlotCache(self.target.num_layers, longest + self.num_slots_per_step, len(group))
            logits.append(self._prefill_group(padded[group, :longest], lengths[group], own))
            hidden.append(self.forward.hidden)
            cache.take(own, group)
        place = torch.cat(groups).argsort()
        self.forward.hidden = None if self.forward.tap is None else torch.cat(hidden)[place]
        return torch.cat(logits)[place]

    def _prefill_group(self, padded: Tensor, lengths: Tensor, cache: SlotCache, num_cached: int = 0) -> Tensor:
        """The same of prompts that are run together."""
        K = self.num_speculative_tokens if self.mode == "fused" else 0
        block = self.forward.block_inputs(lengths, K) if K else None
        gate, tap = self.forward.gate, self.forward.tap
        with self.forward.attached(), self.forward.packed():
            logits = prefill_prompts(self.target, padded, lengths, cache, block, gate, tap, num_cached)
            if logits is not None:
                self.forward.hidden = None if tap is None else tap.hidden
                return logits
        # long or begun prompts, of which all but the last token is in the cache
        plan = self._plans["draft"] if K else self.forward.plan(real_layout(1))
        with self.forward.attached():
            return self.forward.run(plan, cache, lengths - 1, padded.gather(1, (lengths - 1)[:, None]))

    def attached(self) -> AbstractContextManager[None]:
        """What must be on the base while steps run; see `RowForward.attached`."""
        return self.forward.attached()

    @torch.no_grad()
    def step(self, state: DecodeState) -> None:
        """One round: one forward (plain, fused) or two (two_pass). No value on the device is read by the host."""
        if self.mode == "two_pass":
            self._two_pass_step(state)
        else:
            self._fused_step(state)

    def step_logits(
        self, state: DecodeState, candidates: Candidates | None = None, plan: RowPlan | None = None
    ) -> Tensor:
        """The forward of a plain or fused step: logits of `[bonus, candidates | block_0 .. ]`, [B, R, V]."""
        candidates = self._candidates(state) if candidates is None else candidates
        bonus = state.bonus[:, None]
        rows = torch.cat([bonus, candidates.ids], dim=1) if candidates.ids.shape[1] else bonus
        return self.forward.run(plan or self._plans["step"], state.cache, state.lengths, rows)

    def _candidates(self, state: DecodeState, exact: Tensor | None = None) -> Candidates:
        """The drafts, and what is copied behind them; `exact` = the token between the bonus token and them, [B, 1]."""
        if self._copier is None or state.context is None:
            return Candidates(state.drafts, None, state.draft_length)
        ids = state.drafts if exact is None else torch.cat([exact, state.drafts], dim=1)
        first = state.lengths + 1
        state.write(first, ids, self._token_index[: ids.shape[1]])
        first = first if exact is None else first + 1
        return self._copier.candidates(state.context, first, state.draft_length)

    def _fused_step(self, state: DecodeState) -> None:
        K, num_real = self.num_speculative_tokens, self._plans["step"].layout.num_real
        candidates = self._candidates(state)
        if self._tree is not None:
            tree = self._tree.standing(state.parents)
            logits = self.step_logits(state, candidates, tree.plan)
            found = self._walk(tree, state, logits[:, :num_real], [state.bonus[:, None]])
            state.commit(found.tokens, found.num_accepted, self._token_index)
            state.draft_length = found.next_length
            self._draft_from(state, logits, found.next_rows)
            return
        logits = self.step_logits(state, candidates)
        # the argmax of all rows at once; processors and float64 models need scores of the real rows, a head of a block
        best = None
        if self.law.is_plain_argmax(logits.dtype):
            best = likeliest(logits if self.head is None else logits[:, :num_real])
        real = (logits if best is None else best)[:, :num_real]
        tokens, num_accepted = self._verify(state, real, candidates, [state.bonus[:, None]])
        state.mark(num_accepted, candidates.num_copies)
        state.commit(tokens, num_accepted, self._token_index)
        if K:
            # behind the length of a shorter block its last row's draft stands again, and does not exist
            block = self._next_block.index_select(0, num_accepted)
            rows, state.draft_length = block[:, :K], block[:, K]
            if best is not None and self.head is None:
                state.drafts = best.gather(1, rows)
            else:
                self._draft_from(state, logits, rows)

    def _two_pass_step(self, state: DecodeState) -> None:
        bonus = state.bonus[:, None]
        logits = self.forward.run(self._plans["draft"], state.cache, state.lengths, bonus)
        hidden = self._block_hidden()
        exact = self._choose(state, logits[:, :1], bonus)
        self._draft(state, logits[:, 1:], hidden, exact[:, 0])
        candidates = self._candidates(state, exact)
        rows = torch.cat([exact, candidates.ids], dim=1)
        tree = None if self._tree is None else self._tree.standing(state.parents)
        plan = self._plans["verify"] if tree is None else tree.plan
        logits = self.forward.run(plan, state.cache, state.lengths + 1, rows)
        if tree is not None:
            found = self._walk(tree, state, logits, [bonus, exact])
            tokens, num_accepted = found.tokens, found.num_accepted
        else:
            tokens, num_accepted = self._verify(state, logits, candidates, [bonus, exact])
            state.mark(num_accepted, candidates.num_copies)
        state.commit(torch.cat([exact, tokens], dim=1), num_accepted + 1, self._token_index)

    def _block_hidden(self) -> Tensor | None:
        """What the output head read in the last forward behind its first row, where no head drafts None."""
        return None if self.forward.hidden is None else self.forward.hidden[:, 1:]

    def _draft_from(self, state: DecodeState, logits: Tensor, rows: Tensor) -> None:
        """Drafts behind the bonus token from the run that some rows of the last forward are, shape [B, K]."""
        hidden = None if self.forward.hidden is None else rows_of_each(self.forward.hidden, rows)
        self._draft(state, rows_of_each(logits, rows), hidden, state.bonus)

    def _draft(self, state: DecodeState, logits: Tensor, hidden: Tensor | None, previous: Tensor) -> None:
        """Drafts from a block's rows, with the law q of those that are drawn, or the parents that nodes have.

        `previous` = the token before the first, shape [B].
        """
        if self._tree is not None:
            state.drafts, state.parents = self._tree.draft(self.head, logits, hidden, previous, state.draft_length)
        elif self.head is None or hidden is None:
            state.drafts, state.draft_probs = self.law.draw(logits)
        else:
            state.drafts, state.draft_probs = self.head.draft(self.law, logits, hidden, previous)

    def _walk(self, tree: TreeSteps | StandingTree, state: DecodeState, real: Tensor, rows: list[Tensor]) -> Walk:
        """Walks the tree by the target's choices at its rows, whose logits are `real`, and keeps what stands.

        `rows` = ids not yet committed before the nodes.
        """
        prefix_of, before = None, len(rows) - 1
        if self.law.needs_prefix:
            since = torch.cat([*rows, state.drafts], dim=1)
            prefix_of = self._prefixes(
                state, since, lambda b, r: [*range(before), *(before + row for row in tree.path_of(b, r))]
            )
        chosen = self.law.argmax(real, prefix_of) if self.law.greedy else self.law.sample(real, prefix_of)
        found = tree.walk(chosen, state.drafts, state.draft_length)
        state.mark(found.num_accepted)
        compact(state.cache, found.path, self._walk_index, looks=real.is_cpu and not self.is_recorded)
        return found

    def _choose(self, state: DecodeState, logits: Tensor, since: Tensor) -> Tensor:
        """A token from the target's own law at one real row, shape [B, 1]; `since` = ids not yet committed."""
        prefix_of = self._prefixes(state, since, lambda b, r: range(since.shape[1]))
        if self.law.greedy:
            return self.law.argmax(logits, prefix_of)
        return verify_sample(
            self.law.probs(logits, prefix_of),
            logits.new_zeros(logits.shape[0], 0, logits.shape[2], dtype=torch.float32),
            state.drafts[:, :0],
            state.draft_length,
            generator=self.law.generator,
        ).tokens

    def _verify(
        self, state: DecodeState, real: Tensor, candidates: Candidates, rows: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Emitted tokens, shape [B, W + 1], and accepted candidates, shape [B].

        `real` = logits of the real rows, or their argmax already; `rows` = ids not yet committed before them.
        """
        K, ids, length = self.num_speculative_tokens, candidates.ids, candidates.length
        prefix_of = None
        if self.law.needs_prefix:
            prefix_of = self._prefixes(state, torch.cat([*rows, ids], dim=1), lambda b, r: range(len(rows) + r))
        if not real.is_floating_point():
            verdict = verify_greedy(real, ids, length)
        elif self.law.greedy or not K:
            choose = self.law.argmax if self.law.greedy else self.law.sample
            verdict = verify_greedy(choose(real, prefix_of), ids, length)
        else:
            q, generator = state.draft_probs, self.law.generator
            assert q is not None
            p = self.law.probs(real[:, : K + 1], prefix_of)
            verdict = verify_sample(
                p, q, state.drafts, state.draft_length, verification=self.verification, generator=generator
            )
            if self.copy_tokens:
                behind = None if prefix_of is None else lambda b, r: prefix_of(b, r + 1)
                drawn = self.law.sample(real[:, 1:], behind)
                verdict = verify_copies(verdict, drawn, ids, state.draft_length, length)
        return verdict.tokens, verdict.num_accepted

    def _prefixes(
        self, state: DecodeState, since: Tensor, path_of: Callable[[int, int], Sequence[int]]
    ) -> Callable[[int, int], Tensor] | None:
        """The tokens before what row (b, r) predicts: prompt, committed output, the ids of `since` on its path."""
        if not self.law.needs_prefix:
            return None
        return lambda b, r: torch.cat([state.committed(b), since[b, list(path_of(b, r))]])
