"""The step: one forward that drafts, verifies and commits, with all state in tensors on the device.

Knows token ids only: no tokenizer, no files, no loop. `plain` is the same step without drafts and touches no adapter.
Legend: B batch, P padded prompt length, K num_speculative_tokens, L copy_tokens, W = K + L candidates, N nodes of a
tree, R rows of a forward, D width, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pardec.decoding.copying import Candidates, Copier, sources_of
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.plans import StepPlans, Verifying
from pardec.decoding.prefill import Prefill
from pardec.decoding.prompt_graphs import PromptGraphs
from pardec.decoding.rows import RowForward, RowPlan
from pardec.decoding.sampling import TokenLaw, likeliest
from pardec.decoding.state import DecodeState
from pardec.decoding.verifier import Verifier
from pardec.decoding.verify import Verification
from pardec.draft_tree import AnyTree, DynamicTree
from pardec.layout import full_blocks
from pardec.target.cache import SlotCache, aligned
from pardec.target.forward import TargetModel
from pardec.target.hidden import rows_of_each
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
        block_lengths: of the fused chain, W + 1 numbers in 0..K; default K behind the drafts, 0 behind the copies. Of
            those beside a tree the last L count.
        head: draws the drafts one after another by what the tap of `forward` sees; None to draw them from their rows
            as they are.
        verification: of drafts that were drawn.
        copy_tokens: L.
        tree: of candidates in place of the chain, K deep; copies are then one more branch from its root.
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

    def __post_init__(self) -> None:
        assert (self.head is None) == (self.forward.tap is None)
        K, L = self.num_speculative_tokens, self.copy_tokens
        blocks = (*full_blocks(K), *(0,) * L) if self.block_lengths is None else tuple(self.block_lengths)
        self._plans = StepPlans.of(
            self.forward, self.mode, num_speculative_tokens=K, copy_tokens=L, blocks=blocks, tree=self.tree
        )
        assert self.tree is None or self.tree.num_speculative_tokens == K
        block = self._plans.draft if self.mode == "fused" and K else None
        self._prefill = Prefill(self.forward, block, self.num_slots_per_step)
        self._verifier = Verifier(self.law, K, self.verification)
        self._copier = Copier(L + (K if self.tree is None else 0), self.target.device) if L else None
        self._token_index = torch.arange(self.tokens_per_step, device=self.target.device)

    @property
    def target(self) -> TargetModel:
        """The frozen model."""
        return self.forward.target

    @property
    def rows_per_step(self) -> int:
        """Rows of the forwards of a step, summed."""
        return self._plans.num_rows

    @property
    def num_drafts(self) -> int:
        """Drafted tokens that a step verifies: K, or the nodes of the tree."""
        return self.num_speculative_tokens if self.tree is None else self.tree.num_nodes

    @property
    def tokens_per_step(self) -> int:
        """The most tokens that a step may emit."""
        K, L = self.num_speculative_tokens, self.copy_tokens
        return (K + L if self.tree is None else max(K, L)) + (2 if self.mode == "two_pass" else 1)

    @property
    def num_slots_per_step(self) -> int:
        """Cache slots that a step writes behind the committed tokens."""
        return self._plans.num_slots

    def num_slots(self, prompt_tokens: int) -> int:
        """Cache slots that a sequence needs whose prompt has `prompt_tokens` tokens."""
        num_slots = prompt_tokens + self.max_new_tokens + self.num_slots_per_step
        return aligned(num_slots, self.target.dtype, self.target.device)

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
        graphs: PromptGraphs | None = None,
    ) -> DecodeState:
        """Runs the prompts, in fused mode with one block of mask tokens behind each, and emits the first token.

        Args:
            prompts: lists of token ids, none empty.
            repeats: sequences that continue each prompt, next to each other; the prompt is run once for all.
            num_unused: further rows of the batch, done from the beginning.
            cache: to be written into; default one for B = len(prompts) repeats + num_unused sequences.
            capacity: new tokens that the state can hold; default `max_new_tokens`.
            num_cached: tokens at the beginning of every prompt whose keys and values `cache` holds already.
            graphs: that short prompts are run by; default they run as they are.
        """
        K, B = self.num_speculative_tokens, len(prompts) * repeats + num_unused
        cache = cache or SlotCache(self.target.num_layers, self.num_slots(max(map(len, prompts))), B)
        looks_in = None
        if self.copy_tokens:
            rows = sources_of([prompt for prompt in prompts for _ in range(repeats)], num_unused)
            looks_in = torch.tensor(rows, device=self.target.device)
        options = {"repeats": repeats, "num_unused": num_unused, "num_cached": num_cached}
        ran = self._prefill.run(prompts, cache, graphs, **options)
        state = DecodeState.begin(
            cache,
            ran.prompts,
            ran.lengths,
            self.eos_token_ids,
            room=torch.where(torch.arange(B, device=ran.lengths.device) < B - num_unused, self.max_new_tokens, 0),
            drafts=ran.lengths.new_zeros(B, self.num_drafts),
            draft_length=K,
            draft_probs=ran.logits.new_zeros(B, K, ran.logits.shape[2]).float() if self._draws_drafts else None,
            parents=ran.lengths.new_zeros(B, self.num_drafts) if isinstance(self.tree, DynamicTree) else None,
            width=self.tokens_per_step,
            capacity=capacity or self.max_new_tokens,
            sources=looks_in,
        )
        first = self._verifier.choose(state, ran.logits[:, :1], state.drafts[:, :0])
        if self.mode == "fused" and K:
            self._draft(state, ran.logits[:, 1:], ran.hidden, first[:, 0])
        state.emit(torch.cat([first, state.tokens[:, 1:]], dim=1), torch.zeros_like(ran.lengths), self._token_index)
        return state

    @property
    def _draws_drafts(self) -> bool:
        return self.num_speculative_tokens > 0 and not self.law.greedy and self.tree is None

    def attached(self) -> AbstractContextManager[None]:
        """What must be on the base while steps run; see `RowForward.attached`."""
        return self.forward.attached()

    @torch.no_grad()
    def step(self, state: DecodeState) -> None:
        """One round: one forward (plain, fused) or two (two_pass). No value on a device is read by the host."""
        if self.mode == "two_pass":
            self._two_pass_step(state)
        else:
            self._fused_step(state)

    def step_logits(
        self, state: DecodeState, candidates: Candidates | None = None, plan: RowPlan | None = None
    ) -> Tensor:
        """The forward of a plain or fused step: logits of `[bonus, candidates | block_0 .. ]`, [B, R, V]."""
        candidates = self._candidates(state) if candidates is None else candidates
        rows = self._real_rows(state, state.bonus[:, None], candidates)
        plan = plan or self._verifying(candidates).plan
        return self.forward.run(plan, state.cache, state.lengths, rows)

    def _candidates(self, state: DecodeState, exact: Tensor | None = None) -> Candidates:
        """What is verified in a line: a chain's drafts, and what is copied behind them; beside a tree copies alone.

        `exact` = the token between the bonus token and them, [B, 1].
        """
        drafts, length = state.drafts if self.tree is None else state.drafts[:, :0], state.draft_length
        if self._copier is None or state.texts is None:
            return Candidates(drafts, None, length)
        if self.tree is not None:
            length = torch.zeros_like(length)
        ids = drafts if exact is None else torch.cat([exact, drafts], dim=1)
        first = state.lengths + 1
        state.write(first, ids, self._token_index[: ids.shape[1]])
        first = first if exact is None else first + 1
        found = self._copier.candidates(state.texts, first, length)
        looks = found.length.is_cpu and not self.is_recorded
        if looks and torch.equal(found.length, length):  # nothing is copied, and there rows take time
            return Candidates(drafts, found.num_copies, found.length)
        return found

    def _real_rows(self, state: DecodeState, before: Tensor, candidates: Candidates) -> Tensor:
        """Ids of real rows: some, shape [B, n], a tree's nodes, candidates in a line."""
        parts = [before, candidates.ids] if self.tree is None else [before, state.drafts, candidates.ids]
        parts = [part for part in parts if part.shape[1]]
        return torch.cat(parts, dim=1) if len(parts) > 1 else before

    def _verifying(self, candidates: Candidates) -> Verifying:
        """The forward that verifies these candidates, and a tree."""
        num_nodes = 0 if self.tree is None else self.num_drafts
        return self._plans.verifying(num_nodes + candidates.ids.shape[1])

    def _fused_step(self, state: DecodeState) -> None:
        K, candidates = self.num_speculative_tokens, self._candidates(state)
        forward = self._verifying(candidates)
        num_real = forward.plan.layout.num_real
        if forward.tree is not None:
            tree = forward.tree.standing(state.parents)
            logits = self.step_logits(state, candidates, tree.plan)
            found = self._walk(forward, tree, state, logits[:, :num_real], candidates, [state.bonus[:, None]])
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
        tokens, num_accepted = self._verifier.verify(state, real, candidates, [state.bonus[:, None]])
        state.mark(num_accepted, candidates.num_copies)
        state.commit(self._padded(tokens), num_accepted, self._token_index)
        if K and forward.next_block is not None:
            # behind the length of a shorter block its last row's draft stands again, and does not exist
            block = forward.next_block.index_select(0, num_accepted)
            rows, state.draft_length = block[:, :K], block[:, K]
            if best is not None and self.head is None:
                state.drafts = best.gather(1, rows)
            else:
                self._draft_from(state, logits, rows)

    def _two_pass_step(self, state: DecodeState) -> None:
        bonus = state.bonus[:, None]
        logits = self.forward.run(self._plans.draft, state.cache, state.lengths, bonus)
        hidden = self._block_hidden()
        exact = self._verifier.choose(state, logits[:, :1], bonus)
        self._draft(state, logits[:, 1:], hidden, exact[:, 0])
        candidates = self._candidates(state, exact)
        forward, rows = self._verifying(candidates), self._real_rows(state, exact, candidates)
        tree = None if forward.tree is None else forward.tree.standing(state.parents)
        plan = forward.plan if tree is None else tree.plan
        logits = self.forward.run(plan, state.cache, state.lengths + 1, rows)
        if tree is not None:
            found = self._walk(forward, tree, state, logits, candidates, [bonus, exact])
            tokens, num_accepted = found.tokens, found.num_accepted
        else:
            tokens, num_accepted = self._verifier.verify(state, logits, candidates, [bonus, exact])
            tokens = self._padded(tokens)
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
        tree = self._plans.verify.tree
        if tree is not None:
            state.drafts, state.parents = tree.draft(self.head, logits, hidden, previous, state.draft_length)
        elif self.head is None or hidden is None:
            state.drafts, state.draft_probs = self.law.draw(logits)
        else:
            state.drafts, state.draft_probs = self.head.draft(self.law, logits, hidden, previous)

    def _walk(
        self,
        forward: Verifying,
        tree: TreeSteps | StandingTree,
        state: DecodeState,
        real: Tensor,
        candidates: Candidates,
        rows: list[Tensor],
    ) -> Walk:
        """Walks the tree, and the copies beside it, by the target's choices at their rows, and keeps what stands.

        `real` = logits of these rows; `rows` = ids not yet committed before the nodes.
        """
        found = self._verifier.walk(forward, tree, state, real, candidates, rows)
        state.mark(found.num_accepted, candidates.num_copies, found.num_drafts)
        index = self._token_index[: found.path.shape[1]]
        compact(state.cache, found.path, index, looks=real.is_cpu and not self.is_recorded)
        return replace(found, tokens=self._padded(found.tokens))

    def _padded(self, tokens: Tensor) -> Tensor:
        """As many columns as the verifying forward of a step emits at most, where it left out the copies' rows."""
        missing = self.tokens_per_step - (self.mode == "two_pass") - tokens.shape[1]
        return F.pad(tokens, (0, missing)) if missing else tokens
