"""Whole steps of trees: token for token what transformers' own generate gives, wherever a walk goes."""

from functools import partial

import pytest
import torch
from covering import every_pair
from greedy_oracle import plain_generate, prompts, tokens_of_generate
from recorded_steps import V, assert_kept_as_plain_steps_write, decoder_for, results
from tiny_models import FAMILIES, tiny_model
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from tree_samples import BRANCHING, CROOKED, DYNAMIC, TREES, WIDE, nodes_that_lead_to

from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.draft_tree import DraftTree, DynamicTree
from pardec.target.cache import SlotCache

NEW = 22
GREEDY = TokenLaw(greedy=True)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return tiny_model(request.param), prompts(V), tokens_of_generate(request.param, V, NEW + 5)


def decoded_by_planting(decoder: Decoder, rows, references, ends, tree: DraftTree | None = None) -> DecodeState:
    """Decodes with nodes that lead the walk of sequence b in its step s to row `ends(b, s)`, all of them alive.

    `tree` = the shape that a dynamic tree has in these steps; default the decoder's own.
    """
    exact = 1 if decoder.mode == "two_pass" else 0
    if tree is None:
        assert isinstance(decoder.tree, DraftTree)
        tree = decoder.tree
    expected: list[list[int]] = [[] for _ in rows]

    def plant(state: DecodeState, *args, step: int) -> None:
        drafts = []
        for b, reference in enumerate(references):
            start = int(state.num_new[b]) + exact
            row = ends(b, step)
            if not bool(state.done[b]):
                expected[b].append(tree.depths[row])
            drafts.append(nodes_that_lead_to(tree, row, (reference + [0] * 9)[start:]))
        state.drafts = torch.tensor(drafts)
        if isinstance(decoder.tree, DynamicTree):
            state.parents = torch.tensor([tree.parents] * len(rows))

    step = 0
    with torch.no_grad(), decoder.attached():
        state = decoder.prefill(rows)
        while not state.done.all():
            if exact:
                decoder._draft = partial(plant, step=step)  # type: ignore[method-assign]
            else:
                plant(state, step=step)
                state.draft_length = torch.full_like(state.draft_length, tree.num_speculative_tokens)
            decoder.step(state)
            step += 1
    assert [[a for a, _ in rounds] for rounds in state.rounds()] == expected
    return state


@pytest.mark.parametrize(
    ("family", "mode", "name", "batch", "is_dynamic"),
    every_pair(list(FAMILIES), ["fused", "two_pass"], ["branching", "crooked"], [1, 4], [False, True]),
    indirect=["family"],
)
def test_walks_to_every_node_leave_tokens_and_cache_as_generate_has_them(family, mode, name, batch, is_dynamic):
    (model, rows, references), tree = family, {"branching": BRANCHING, "crooked": CROOKED}[name]
    shape = DynamicTree(tree.runs) if is_dynamic else tree
    decoder = decoder_for(model, mode, GREEDY, new_tokens=NEW, tree=shape)
    rows, references = rows[:batch], references[:batch]
    state = decoded_by_planting(
        decoder, rows, references, lambda b, s: (3 * s + 2 * b + 1) % (tree.num_nodes + 1), tree
    )
    found = [row[:n] for row, n in zip(state.output.tolist(), state.num_new.tolist(), strict=True)]
    assert found == [reference[:NEW] for reference in references]


def test_what_is_kept_of_the_cache_is_what_plain_steps_write(family):
    model, rows, references = family
    decoder = decoder_for(model, "fused", GREEDY, new_tokens=NEW, tree=BRANCHING)
    state = decoded_by_planting(decoder, rows, references, lambda b, s: (6, 4, 5, 3)[(b + s) % 4])
    assert_kept_as_plain_steps_write(model, state, rows, NEW)


@pytest.fixture(scope="module")
def windows():
    model = tiny_model("gemma3-mixed-windows", vocab_size=V)
    rows = prompts(V)
    return model, rows, [plain_generate(model, row, NEW) for row in rows]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    every_pair([*TREES, *DYNAMIC], ["fused", "two_pass"], [{}, {"head_width": 6}, {"noise": True}]),
    ids=str,
)
def test_own_drafts_of_any_tree_give_generates_tokens_in_ragged_batches(windows, name, mode, options):
    (model, rows, references), tree = windows, (TREES | DYNAMIC)[name]
    decoder = decoder_for(model, mode, GREEDY, new_tokens=NEW, tree=tree, **options)
    with torch.no_grad(), decoder.attached():
        state = decoder.prefill(rows)
        while not state.done.all():
            decoder.step(state)
    assert [tokens for tokens, _, _ in results(decoder, state)] == references


@pytest.mark.parametrize("blocks", [(3, 3, 3, 3), (3, 1, 2, 0)])
@pytest.mark.parametrize("options", [{}, {"head_width": 6}], ids=["masks", "head"])
@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_the_tree_with_one_child_each_does_what_the_chain_does(mode, options, blocks):
    """A model of few tokens, so that drafts are often right: the same tokens, rounds and drafts in every step."""
    model = tiny_model("llama", vocab_size=7)
    rows = prompts(7)
    if mode == "two_pass":
        blocks = (3, 3, 3, 3)
    chain = decoder_for(model, mode, GREEDY, new_tokens=40, **options)
    chain.block_lengths = blocks
    chain.__post_init__()
    tree = decoder_for(model, mode, GREEDY, new_tokens=40, tree=DraftTree.chain(blocks), **options)
    states = []
    with torch.no_grad():
        for decoder in (chain, tree):
            with decoder.attached():
                states.append(decoder.prefill(rows))
        while not states[0].done.all():
            for decoder, state in zip((chain, tree), states, strict=True):
                with decoder.attached():
                    decoder.step(state)
            for name in ("drafts", "draft_length", "tokens", "num_accepted", "lengths", "bonus"):
                live = ~states[0].done
                mine, theirs = (getattr(state, name)[live] for state in states)
                if name == "tokens":  # those behind the bonus token are left over
                    valid = torch.arange(mine.shape[1]) <= states[0].num_accepted[live][:, None] + (mode == "two_pass")
                    mine, theirs = mine[valid], theirs[valid]
                assert torch.equal(mine, theirs), name
    assert results(tree, states[1]) == results(chain, states[0])
    assert sum(a for rounds in states[0].rounds() for a, _ in rounds) > 5


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_nodes_deeper_than_the_run_that_they_come_from_are_dead(mode):
    model = tiny_model("llama")
    row, tree = prompts(V)[0], BRANCHING
    reference = plain_generate(model, row, 12)
    exact = 1 if mode == "two_pass" else 0
    for length in range(4):
        decoder = decoder_for(model, mode, GREEDY, new_tokens=12, tree=tree)
        with torch.no_grad(), decoder.attached():
            state = decoder.prefill([row])
            planted = torch.tensor([nodes_that_lead_to(tree, 3, reference[1 + exact :])])
            decoder._draft = lambda state, *a, planted=planted: setattr(state, "drafts", planted)  # type: ignore
            state.drafts, state.draft_length = planted, torch.tensor([length])
            decoder.step(state)
        assert state.rounds()[0] == [(length, length)]
        emitted = int(state.num_new[0])
        assert emitted == 2 + length + exact
        assert state.output[0, :emitted].tolist() == reference[:emitted]


def test_the_next_nodes_are_as_deep_as_the_run_behind_the_end_is_long():
    model, tree = tiny_model("llama"), BRANCHING
    row = prompts(V)[0]
    reference = plain_generate(model, row, 12)
    for end in range(tree.num_nodes + 1):
        decoder = decoder_for(model, "fused", GREEDY, new_tokens=12, tree=tree)
        with torch.no_grad(), decoder.attached():
            state = decoder.prefill([row])
            state.drafts = torch.tensor([nodes_that_lead_to(tree, end, reference[1:])])
            decoder.step(state)
        assert int(state.draft_length) == tree.runs[end]
        assert state.num_accepted.tolist() == [tree.depths[end]]


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_eos_and_the_length_limit_end_a_walk_wherever_they_fall(mode):
    model = tiny_model("llama")
    row = prompts(V)[0]
    reference = plain_generate(model, row, 30)
    # rows 4 and 6 lie off the first branch: tokens are emitted from nodes that must move
    for end in range(9):
        decoder = decoder_for(model, mode, GREEDY, new_tokens=20, tree=BRANCHING, eos=[reference[end], V])
        state = decoder.prefill([row])
        if not bool(state.done):
            state = decoded_by_planting(decoder, [row], [reference], lambda b, s: 6)
        expected = plain_generate(model, row, 20, eos_token_id=reference[end], pad_token_id=0)
        assert state.output[0, : int(state.num_new)].tolist() == expected
    for limit in range(2, 9):
        decoder = decoder_for(model, mode, GREEDY, new_tokens=limit, tree=BRANCHING)
        state = decoded_by_planting(decoder, [row], [reference], lambda b, s: 6)
        assert state.output[0, : int(state.num_new)].tolist() == reference[:limit]


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_processors_see_the_tokens_on_the_path_to_each_node(mode):
    """A repetition penalty goes by all tokens before: those of the node's own branch and no others."""
    model = tiny_model("llama", dtype=torch.float32)
    rows = prompts(V)[:2]
    references = [plain_generate(model, row, NEW + 5, repetition_penalty=1.7) for row in rows]
    assert references != [plain_generate(model, row, NEW + 5) for row in rows]
    with pytest.warns(UserWarning, match="RepetitionPenalty"):
        law = TokenLaw(True, (RepetitionPenaltyLogitsProcessor(1.7),))
    decoder = decoder_for(model, mode, law, new_tokens=NEW, tree=BRANCHING)
    state = decoded_by_planting(decoder, rows, references, lambda b, s: (6, 3, 7, 5)[(b + s) % 4])
    assert [row[:NEW] for row in state.output.tolist()] == [reference[:NEW] for reference in references]


def test_nothing_is_moved_where_all_walks_followed_the_first_nodes(monkeypatch):
    model, moves = tiny_model("llama"), []
    rows = prompts(V)[:2]
    references = [plain_generate(model, row, 30) for row in rows]
    move = SlotCache.move
    monkeypatch.setattr(SlotCache, "move", lambda self, *slots: (moves.append(1), move(self, *slots)))
    for end, num_moves in ((2, 0), (0, 0), (4, 3)):
        decoder = decoder_for(model, "fused", GREEDY, new_tokens=7, tree=BRANCHING)
        decoded_by_planting(decoder, rows, references, lambda b, s, end=end: end * (b == 1))
        assert (len(moves) > 0) == (num_moves > 0)


def test_a_step_has_the_rows_of_its_tree_and_emits_no_more_than_its_depth_allows():
    model = tiny_model("llama")
    for tree in TREES.values():
        fused, two_pass = (decoder_for(model, mode, GREEDY, tree=tree) for mode in ("fused", "two_pass"))
        K, N = tree.num_speculative_tokens, tree.num_nodes
        assert fused.rows_per_step == tree.num_rows
        assert two_pass.rows_per_step == 1 + K + 1 + N
        assert (fused.tokens_per_step, two_pass.tokens_per_step) == (K + 1, K + 2)
    assert decoder_for(model, "fused", GREEDY, tree=WIDE).num_drafts == 3
