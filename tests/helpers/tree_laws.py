"""What one real step of a sampled tree emits and how likely, from the laws that it was about to draw from.

A walk draws a token behind every row. The rows of a batch hold every outcome that matters: tokens that lead along a
path, and then every token that leads no further; the laws that the step draws from weigh them.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from copying_oracle import copied
from sampling_oracle import PROMPT, V
from tiny_models import make_adapter
from tree_samples import children

from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verifier import Verifier
from pardec.draft_tree import AnyTree, DraftTree, DynamicTree
from pardec.target.forward import TargetModel

BONUS = 2
Outcome = tuple[tuple[int, ...], dict[int, int]]  # what is emitted, and what is drawn behind rows for that


def decoder_of(
    toy, tree: AnyTree, mode: str, warper: dict, eos: Sequence[int] = (), copy_tokens: int = 0, copy_run: int = 0
) -> Decoder:
    """Samples a tree whose nodes come from random mask embeddings."""
    law, K = TokenLaw(False, tuple(make_warpers(**warper))), tree.num_speculative_tokens
    masks = make_adapter(toy, K).mask_embeddings
    assert masks is not None
    masks = masks.double() * 3
    eos_ids = torch.tensor(list(eos), dtype=torch.long)
    blocks = (*(K,) * (K + 1), *(copy_run,) * copy_tokens)
    forward = RowForward(TargetModel.wrap(toy), masks)
    return Decoder(forward, mode, K, law, 16, eos_ids, blocks, copy_tokens=copy_tokens, tree=tree)


def distinct_nodes(tree: DraftTree) -> list[int]:
    """Tokens of the nodes, other ones for siblings."""
    return [(parent + 2 * rank + 1) % V for parent, rank in zip(tree.parents, tree.ranks, strict=True)]


def outcomes(tree: DraftTree, nodes: list[int], draft_length: int, copies: Sequence[int] = ()) -> list[Outcome]:
    """Every end of a walk, which goes on along copies where what it has emitted is how they begin."""
    found = []
    for row, path in enumerate(tree.paths):
        depth = len(path) - 1
        if depth > draft_length:
            continue
        onward = [nodes[child - 1] for child in children(tree, row)] if depth < draft_length else []
        drawn = {before: nodes[after - 1] for before, after in itertools.pairwise(path)}
        emitted = tuple(nodes[node - 1] for node in path[1:])
        for token in range(V):
            if token not in onward:
                found += _along(((*emitted, token), drawn | {row: token}), copies, tree.num_nodes)
    return found


def _along(outcome: Outcome, copies: Sequence[int], num_nodes: int) -> list[Outcome]:
    emitted, drawn = outcome
    count = len(emitted)
    if count > len(copies) or emitted != tuple(copies[:count]):
        return [outcome]
    row = num_nodes + count
    return [one for t in range(V) for one in _along(((*emitted, t), drawn | {row: t}), copies, num_nodes)]


def law_of_step(
    toy,
    tree: DraftTree,
    mode: str,
    warper: dict,
    draft_length: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    eos: Sequence[int] = (),
    exact: int | None = None,
    is_dynamic: bool = False,
    prompt: list[int] = PROMPT,
    copy_tokens: int = 0,
    nodes: list[int] | None = None,
) -> dict[tuple[int, ...], float]:
    """{tokens: probability}; with `is_dynamic` the shape is what a dynamic tree happens to have in this step."""
    decoder = decoder_of(toy, DynamicTree(tree.runs) if is_dynamic else tree, mode, warper, eos, copy_tokens)
    nodes = distinct_nodes(tree) if nodes is None else nodes
    text = [*prompt, BONUS, *([] if exact is None else [exact])]
    ends = outcomes(tree, nodes, draft_length, copied(text, copy_tokens))
    B = len(ends)
    chosen = torch.randint(0, V, (B, tree.num_nodes + 1 + copy_tokens), generator=torch.Generator().manual_seed(0))
    for b, (_, drawn) in enumerate(ends):
        for row, token in drawn.items():
            chosen[b, row] = token
    seen = []

    def plant(state, *args):
        state.drafts = torch.tensor([nodes] * B)
        state.parents = torch.tensor([tree.parents] * B) if is_dynamic else None

    def drawn_tokens(self, logits, prefix_of=None):
        seen.append(self.probs(logits, prefix_of))
        return chosen[:, : logits.shape[1]]  # fewer where nothing is copied

    with torch.no_grad():
        state = decoder.prefill([prompt] * B)
        state.bonus = torch.full((B,), BONUS)
        state.draft_length = torch.full((B,), draft_length)
        plant(state)
        state.room, state.done = torch.full((B,), 9), torch.zeros(B, dtype=torch.bool)  # whatever prefill emitted
        if copy_tokens:
            state.sources = torch.arange(B)[:, None]
            state.write(state.lengths, state.bonus[:, None], torch.arange(1))
        before = state.num_new.tolist()
        monkeypatch.setattr(TokenLaw, "sample", drawn_tokens)
        if exact is not None:
            monkeypatch.setattr(Verifier, "choose", lambda *args: torch.full((B, 1), exact))
            monkeypatch.setattr(decoder, "_draft", plant)
        decoder.step(state)
        monkeypatch.undo()
    (p,) = seen
    law: dict[tuple[int, ...], float] = {}
    first = () if exact is None else (exact,)
    for b, (tokens, drawn) in enumerate(ends):
        count = int(state.num_new[b]) - before[b]
        emitted = tuple(state.output[b, before[b] : before[b] + count].tolist())
        cut = next((i + 1 for i, token in enumerate((*first, *tokens)) if token in eos), len(first) + len(tokens))
        assert emitted == (*first, *tokens)[:cut]
        probability = 1.0
        for row, token in drawn.items():
            probability *= float(p[b, row, token])
        law[emitted] = law.get(emitted, 0.0) + probability
    return law
