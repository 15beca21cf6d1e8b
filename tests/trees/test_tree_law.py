"""Sampled trees follow the target's law exactly: by enumeration of whole steps, and by chi-square.

A walk draws a token behind every node. The rows of a batch hold every outcome that matters: tokens that lead along a
path, and then every token that leads no further; the laws that the step draws from weigh them.
"""

import itertools
from collections import Counter

import pytest
import torch
from sampling_oracle import (
    PROMPT,
    WARPERS,
    Z_LIMIT,
    V,
    assert_same_law,
    chi_square_z,
    extended,
    joint_law,
    thin_model,
)
from tiny_models import make_adapter, tiny_model
from tree_samples import children, random_tree

from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.draft_tree import AnyTree, DraftTree, DynamicTree
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel

BONUS = 2
# widths and depths of 1 to 3, all mask tokens everywhere
SHAPES = {
    f"{width} wide, {depth} deep": random_tree(7 * width + depth, min(width * depth, 7), width, depth)
    for width in (1, 2, 3)
    for depth in (1, 2, 3)
}


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


def decoder_of(toy, tree: AnyTree, mode: str, warper: dict, eos=()) -> Decoder:
    law, K = TokenLaw(False, tuple(make_warpers(**warper))), tree.num_speculative_tokens
    masks = make_adapter(toy, K).mask_embeddings
    assert masks is not None
    masks = masks.double() * 3
    eos_ids = torch.tensor(list(eos), dtype=torch.long)
    return Decoder(RowForward(TargetModel.wrap(toy), masks), mode, K, law, 16, eos_ids, tree=tree)


def outcomes(tree: DraftTree, nodes: list[int], draft_length: int) -> list[tuple[tuple[int, ...], dict[int, int]]]:
    """Every end of a walk: the tokens that it emits, and what is drawn behind the rows that it comes through."""
    found = []
    for row, path in enumerate(tree.paths):
        depth = len(path) - 1
        if depth > draft_length:
            continue
        onward = [nodes[child - 1] for child in children(tree, row)] if depth < draft_length else []
        drawn = {before: nodes[after - 1] for before, after in itertools.pairwise(path)}
        emitted = tuple(nodes[node - 1] for node in path[1:])
        found += [((*emitted, token), drawn | {row: token}) for token in range(V) if token not in onward]
    return found


def law_of_step(toy, tree, mode, warper, draft_length, monkeypatch, *, eos=(), exact=None, is_dynamic=False):
    """What one real step emits and how likely: {tokens: probability}, from the laws that it was about to draw from.

    With `is_dynamic` the shape is what a dynamic tree happens to have in this step.
    """
    decoder = decoder_of(toy, DynamicTree(tree.runs) if is_dynamic else tree, mode, warper, eos)
    nodes = distinct_nodes(tree)
    ends = outcomes(tree, nodes, draft_length)
    B = len(ends)
    chosen = torch.randint(0, V, (B, tree.num_nodes + 1), generator=torch.Generator().manual_seed(0))
    for b, (_, drawn) in enumerate(ends):
        for row, token in drawn.items():
            chosen[b, row] = token
    seen = []

    def plant(state, *args):
        state.drafts = torch.tensor([nodes] * B)
        state.parents = torch.tensor([tree.parents] * B) if is_dynamic else None

    def drawn_tokens(self, logits, prefix_of=None):
        seen.append(self.probs(logits, prefix_of))
        return chosen

    with torch.no_grad():
        state = decoder.prefill([PROMPT] * B)
        state.bonus = torch.full((B,), BONUS)
        state.draft_length = torch.full((B,), draft_length)
        plant(state)
        state.room, state.done = torch.full((B,), 9), torch.zeros(B, dtype=torch.bool)  # whatever prefill emitted
        before = state.num_new.tolist()
        monkeypatch.setattr(TokenLaw, "sample", drawn_tokens)
        if exact is not None:
            monkeypatch.setattr(decoder, "_choose", lambda *args: torch.full((B, 1), exact))
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


def distinct_nodes(tree: DraftTree) -> list[int]:
    """Tokens of the nodes, other ones for siblings."""
    return [(parent + 2 * rank + 1) % V for parent, rank in zip(tree.parents, tree.ranks, strict=True)]


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("warper", list(WARPERS))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_step_of_a_tree_emits_the_targets_law(toy, shape, warper, is_dynamic, monkeypatch):
    tree, options = SHAPES[shape], WARPERS[warper]
    K, prefix = tree.num_speculative_tokens, [*PROMPT, BONUS]
    expected = joint_law(toy, prefix, K + 1, options)
    for draft_length in range(K + 1):
        law = law_of_step(toy, tree, "fused", options, draft_length, monkeypatch, is_dynamic=is_dynamic)
        assert max(map(len, law)) == draft_length + 1
        assert_same_law(extended(toy, law, prefix, K + 1, options), expected)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("shape", ["1 wide, 2 deep", "2 wide, 3 deep", "3 wide, 2 deep"])
def test_a_two_pass_round_of_a_tree_emits_the_targets_law(toy, shape, is_dynamic, monkeypatch):
    tree, options, exact = SHAPES[shape], WARPERS["all"], 1
    K, prefix = tree.num_speculative_tokens, [*PROMPT, BONUS]
    law = law_of_step(toy, tree, "two_pass", options, K, monkeypatch, exact=exact, is_dynamic=is_dynamic)
    expected = joint_law(toy, [*prefix, exact], K + 1, options)
    assert_same_law(
        extended(toy, law, prefix, K + 2, options), {(exact, *tokens): share for tokens, share in expected.items()}
    )


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("eos", range(V))
def test_a_walk_that_meets_eos_emits_nothing_behind_it_and_keeps_its_law(toy, eos, is_dynamic, monkeypatch):
    tree, options, prefix = SHAPES["3 wide, 3 deep"], WARPERS["temperature"], [*PROMPT, BONUS]
    K = tree.num_speculative_tokens
    found: dict[tuple[int, ...], float] = {}
    law = law_of_step(toy, tree, "fused", options, K, monkeypatch, eos=[eos], is_dynamic=is_dynamic)
    for tokens, share in law.items():
        rest = {(): 1.0} if eos in tokens else joint_law(toy, prefix + list(tokens), K + 1 - len(tokens), options)
        for more, probability in rest.items():
            whole = (*tokens, *more)
            key = whole[: whole.index(eos) + 1] if eos in whole else whole
            found[key] = found.get(key, 0.0) + share * probability
    expected: dict[tuple[int, ...], float] = {}
    for tokens, share in joint_law(toy, prefix, K + 1, options).items():
        key = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        expected[key] = expected.get(key, 0.0) + share
    assert_same_law(found, expected)


# ---------------------------------------------------------------------- the public API, by chi-square


SAMPLES = 6000
DEEP = DraftTree((0, 0, 1, 1, 2), (0, 1, 0, 1, 2), (2, 1, 2, 0, 2, 1))
DRAWN = DynamicTree((2, 1, 2, 0, 2, 1))


@pytest.fixture(scope="module")
def thin():
    return thin_model()


def sample_counts(model, mode: str, warper: dict, tree: AnyTree = DEEP) -> Counter:
    out = model.generate(
        [PROMPT], max_new_tokens=4, mode=mode, seed=0, num_return_sequences=SAMPLES, tree=tree, **warper
    )
    return Counter(tuple(tokens) for tokens in out.token_ids)


@pytest.mark.parametrize("tree", [DEEP, DRAWN], ids=["constant", "dynamic"])
@pytest.mark.parametrize("head_width", [0, 4])
@pytest.mark.parametrize("mode", ["two_pass", "fused"])
@pytest.mark.parametrize("warper", ["temperature", "all"])
def test_generate_with_a_tree_samples_the_targets_law(thin, mode, warper, head_width, tree):
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, 2, lora_rank=2, head_width=head_width, shortlist=V))
    counts = sample_counts(ours, mode, WARPERS[warper], tree)
    assert chi_square_z(counts, joint_law(thin, PROMPT, 4, WARPERS[warper])) < Z_LIMIT


def test_the_chi_square_notices_a_tree_that_is_chosen_by_what_was_drawn(thin, monkeypatch):
    """Where nodes follow the draws, the law is lost: a walk must not accept what it was made for."""
    from pardec.trees import tree_steps

    walk = tree_steps.walk

    def lossy(tables, target_tokens, node_tokens, draft_length):
        # where the first node was not drawn, it is taken all the same
        return walk(tables, target_tokens.where(target_tokens > 1, node_tokens[:, :1]), node_tokens, draft_length)

    monkeypatch.setattr(tree_steps, "walk", lossy)
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, 2, lora_rank=2))
    counts = sample_counts(ours, "fused", WARPERS["temperature"])
    assert chi_square_z(counts, joint_law(thin, PROMPT, 4, WARPERS["temperature"])) > 2 * Z_LIMIT
