"""Whole steps of trees with copied tokens beside them: token for token what transformers' own generate gives."""

import itertools
from functools import cache, partial

import pytest
import torch
from copying_oracle import copied
from covering import every_pair
from greedy_oracle import plain_generate, prompts, tokens_of_generate
from recorded_steps import V, assert_kept_as_plain_steps_write, decoder_for, results, tape
from tiny_models import FAMILIES, tiny_model
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from tree_samples import BRANCHING, DYNAMIC, TREES, nodes_that_lead_to

from pardec.decoding.copying import MARGIN
from pardec.decoding.engine import Engine
from pardec.decoding.output import outputs_of
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.draft_tree import DraftTree, DynamicTree

NEW, L = 24, 5
LENGTHS = (40, 33, 47, 36)  # prompts that what will come can be planted into
GREEDY = TokenLaw(greedy=True)
BOTH = pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    rows = prompts(V, LENGTHS)
    return tiny_model(request.param), rows, tokens_of_generate(request.param, V, NEW + L + 3, LENGTHS)


def planted(reference: list[int], length: int, wrong_every: int) -> list[int]:
    """So many tokens, those of `reference` but for one in `wrong_every`."""
    tokens = [60 - t if i % wrong_every == wrong_every - 1 else t for i, t in enumerate(reference)]
    return (tokens + [60] * length)[:length]


def decoded(decoder: Decoder, rows, references, ends, wrong_every: int, tree: DraftTree = BRANCHING) -> DecodeState:
    """Decodes with nodes that lead the walk of sequence b in its step s to row `ends(b, s)`, as long as they live.

    Copies come from a context whose prompt has been replaced by what will be emitted, but for one token in
    `wrong_every`; the model does not read it. What every round accepts is held against loops.
    """
    exact, K = int(decoder.mode == "two_pass"), tree.num_speculative_tokens
    expected: list[list[tuple[int, int, int, int]]] = [[] for _ in rows]
    texts = [planted(reference, len(row), wrong_every) for row, reference in zip(rows, references, strict=True)]

    def plant(state: DecodeState, *args, step: int) -> None:
        drafts = []
        for b, reference in enumerate(references):
            start, row = int(state.num_new[b]) + exact, ends(b, step)
            truth = (reference + [0] * 9)[start:]
            drafts.append(nodes_that_lead_to(tree, row, truth))
            if not bool(state.done[b]):
                length = int(state.draft_length[b])
                expected[b].append(round_of(tree, row, length, truth, [*texts[b], *reference[:start]], decoder))
        state.drafts = torch.tensor(drafts)
        if isinstance(decoder.tree, DynamicTree):
            state.parents = torch.tensor([tree.parents] * len(rows))

    step = 0
    with torch.no_grad(), decoder.attached():
        state = decoder.prefill(rows)
        assert state.context is not None
        for b, text in enumerate(texts):
            state.context[b, MARGIN : MARGIN + len(text)] = torch.tensor(text)
        assert int(state.draft_length.min()) == K
        while not state.done.all():
            if exact:
                decoder._draft = partial(plant, step=step)  # type: ignore[method-assign]
            else:
                plant(state, step=step)
            decoder.step(state)
            step += 1
    pairs = zip(state.rounds(), state.copies(), strict=True)
    found = [[(*drafts, *copies) for drafts, copies in zip(*both, strict=True)] for both in pairs]
    assert found == expected
    return state


def round_of(
    tree: DraftTree, row: int, length: int, truth: list[int], text: list[int], decoder: Decoder
) -> tuple[int, int, int, int]:
    """Accepted nodes, levels of them, accepted copies, and copies."""
    num_copies = decoder.copy_tokens
    nodes, copies = min(tree.depths[row], length), copied(text, num_copies)
    same = [mine == theirs for mine, theirs in zip(copies, truth, strict=False)]
    along = [*same, False].index(False)
    return nodes, length, max(along - nodes, 0), len(copies)


def tokens_of(state: DecodeState) -> list[list[int]]:
    return [row[:n] for row, n in zip(state.output.tolist(), state.num_new.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("family", "mode", "wrong_every", "is_dynamic"),
    every_pair(list(FAMILIES), ["fused", "two_pass"], [3, 100], [False, True]),
    indirect=["family"],
)
def test_walks_that_go_on_along_copies_leave_tokens_and_cache_as_generate_has_them(
    family, mode, wrong_every, is_dynamic
):
    model, rows, references = family
    tree = DynamicTree(BRANCHING.runs) if is_dynamic else BRANCHING
    decoder = decoder_for(model, mode, GREEDY, new_tokens=NEW, tree=tree, copy_tokens=L)
    # the first row's nodes are wrong: what it accepts are copies
    state = decoded(decoder, rows, references, lambda b, s: (3 * s + 2 * b) % 8 if b else 0, wrong_every)
    assert tokens_of(state) == [reference[:NEW] for reference in references]
    copies = [accepted for each in state.copies() for accepted, _ in each]
    assert sum(copies) > (16 if wrong_every == 100 else 2)
    # and somewhere a walk came through nodes before it went on along copies
    pairs = zip(itertools.chain(*state.rounds()), itertools.chain(*state.copies()), strict=True)
    assert wrong_every == 3 or any(nodes and more for (nodes, _), (more, _) in pairs)


@pytest.mark.parametrize("copy_runs", [(0, 0), (3, 1), (1, 3, 0, 2, 3, 0)])
@BOTH
def test_drafting_goes_on_behind_the_copy_where_a_walk_ends(copy_runs, is_dynamic):
    """Copies fewer and more than the tree is deep; a copy with no run behind it leaves the next nodes dead."""
    model, rows = tiny_model("llama"), prompts(V, LENGTHS)[:2]
    references = [plain_generate(model, row, NEW + 12) for row in rows]
    tree = DynamicTree(BRANCHING.runs) if is_dynamic else BRANCHING
    decoder = decoder_for(model, "fused", GREEDY, new_tokens=NEW, tree=tree, copy_tokens=len(copy_runs))
    decoder.block_lengths = (*(3,) * 4, *copy_runs)
    decoder.__post_init__()
    assert decoder.rows_per_step == BRANCHING.num_rows + len(copy_runs) + sum(copy_runs)
    state = decoded(decoder, rows, references, lambda b, s: (2 * s + b) % 8, 4)
    assert tokens_of(state) == [reference[:NEW] for reference in references]
    for drafts, copies in zip(state.rounds(), state.copies(), strict=True):
        for (nodes, _), (accepted, _), (_, next_length) in zip(drafts, copies, drafts[1:], strict=False):
            assert not accepted or next_length == copy_runs[nodes + accepted - 1]
    lengths = {length for each in state.rounds() for _, length in each}
    assert {3, copy_runs[0]} <= lengths


def test_what_is_kept_of_the_cache_is_what_plain_steps_write(family):
    model, rows, references = family
    decoder = decoder_for(model, "fused", GREEDY, new_tokens=NEW, tree=BRANCHING, copy_tokens=L)
    state = decoded(decoder, rows, references, lambda b, s: (0, 6, 4, 0)[(b + s) % 4], 4)
    assert_kept_as_plain_steps_write(model, state, rows, NEW)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    every_pair([*TREES, *DYNAMIC], ["fused", "two_pass"], [{}, {"head_width": 6}, {"noise": True}]),
    ids=str,
)
def test_own_drafts_and_copies_give_generates_tokens_in_ragged_batches(name, mode, options):
    tree = (TREES | DYNAMIC)[name]
    model = tiny_model("gemma3-mixed-windows", vocab_size=V)
    rows = [row * 3 for row in prompts(V)]
    decoder = decoder_for(model, mode, GREEDY, new_tokens=40, tree=tree, copy_tokens=L, **options)
    with torch.no_grad(), decoder.attached():
        state = decoder.prefill(rows)
        while not state.done.all():
            decoder.step(state)
    assert [tokens for tokens, _, _ in results(decoder, state)] == repeated_prompts_of_generate()


@cache
def repeated_prompts_of_generate() -> list[list[int]]:
    """What generate makes of every prompt three times over, with a model that nobody else has touched."""
    model = tiny_model("gemma3-mixed-windows", vocab_size=V)
    return [plain_generate(model, row * 3, 40) for row in prompts(V)]


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_eos_and_the_length_limit_end_a_step_wherever_they_fall_among_copies(mode):
    model, row = tiny_model("llama"), prompts(V, LENGTHS)[0]
    reference = plain_generate(model, row, 30)
    for end in range(1, 9):
        decoder = decoder_for(model, mode, GREEDY, new_tokens=20, tree=BRANCHING, copy_tokens=L)
        decoder.eos_token_ids = torch.tensor([reference[end], V])
        expected = plain_generate(model, row, 20, eos_token_id=reference[end], pad_token_id=0)
        if len(expected) > 1:
            assert tokens_of(decoded(decoder, [row], [reference], lambda b, s: 4, 100)) == [expected]
    for limit in range(2, 9):
        decoder = decoder_for(model, mode, GREEDY, new_tokens=limit, tree=BRANCHING, copy_tokens=L)
        assert tokens_of(decoded(decoder, [row], [reference], lambda b, s: 4, 100)) == [reference[:limit]]


@BOTH
@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_processors_see_the_tokens_on_the_way_to_each_copy(mode, is_dynamic):
    model, rows = tiny_model("llama", dtype=torch.float32), prompts(V, LENGTHS)[:2]
    references = [plain_generate(model, row, NEW + L + 3, repetition_penalty=1.7) for row in rows]
    assert references != [plain_generate(model, row, NEW + L + 3) for row in rows]
    with pytest.warns(UserWarning, match="RepetitionPenalty"):
        law = TokenLaw(True, (RepetitionPenaltyLogitsProcessor(1.7),))
    tree = DynamicTree(BRANCHING.runs) if is_dynamic else BRANCHING
    decoder = decoder_for(model, mode, law, new_tokens=NEW, tree=tree, copy_tokens=L)
    state = decoded(decoder, rows, references, lambda b, s: (0, 6, 4, 0)[(b + s) % 4], 4)
    assert tokens_of(state) == [reference[:NEW] for reference in references]


@BOTH
def test_recorded_steps_do_what_steps_that_run_do(is_dynamic):
    """Calls of other prompts, numbers of them and lengths, on one engine whose tensors and recordings stay."""
    model, row = tiny_model("llama"), prompts(V, LENGTHS)[0]
    calls = [([row[:9] * 3], 20), ([row[:9], row[:7] * 3], 12), ([row[:4] * 5, row[:5], row[:3] * 6], 30), ([row], 9)]
    tree, found = DYNAMIC["dynamic"] if is_dynamic else BRANCHING, []
    for captured in (False, True):
        decoder = decoder_for(model, "fused", GREEDY, tree=tree, copy_tokens=L)
        engine = Engine(decoder, 1, captured=captured, recorder=tape)
        found.append([])
        for rows, new_tokens in calls:
            engine.decoder.max_new_tokens = new_tokens
            steps, n = list(engine.run(rows)), len(rows)
            assert engine.state is not None
            emitted = [sum(one.num_copied[b] for one in steps if one.tokens[b]) for b in range(n)]
            found[-1].append((outputs_of(engine.state, n), engine.state.copies()[:n], emitted))
    assert found[0] == found[1]
    for (rows, new_tokens), (outputs, _, _) in zip(calls, found[0], strict=True):
        assert outputs == [plain_generate(model, one, new_tokens) for one in rows]
    assert sum(sum(copied) for _, _, copied in found[0]) > 20


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
@BOTH
def test_a_step_on_a_cpu_leaves_out_the_rows_of_copies_that_no_sequence_has(mode, is_dynamic):
    model, rows = tiny_model("llama"), [list(range(1, 30)), list(range(30, 40)), list(range(40, 59))]
    tree = DynamicTree(BRANCHING.runs) if is_dynamic else BRANCHING
    decoder = decoder_for(model, mode, GREEDY, new_tokens=NEW, tree=tree, copy_tokens=L)
    engine, widths = Engine(decoder, 1), []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    for _ in engine.run(rows, between="nothing"):
        pass
    handle.remove()
    assert outputs_of(engine.state, 3) == [plain_generate(model, row, NEW) for row in rows]
    num_copied = [max(n) for n in zip(*([c for _, c in each] for each in engine.state.copies()), strict=False)]
    short = BRANCHING.num_nodes + 1 if mode == "two_pass" else BRANCHING.num_rows
    seen = set(widths[-1:0:-2] if mode == "two_pass" else widths[1:])
    assert seen <= {short, short + L}
    assert (short + L in seen) == any(num_copied)
    assert short in seen


def test_a_step_emits_no_more_than_its_deeper_branch_allows():
    model = tiny_model("llama")
    for copies, longest in ((2, 3), (3, 3), (7, 7)):
        fused, two_pass = (
            decoder_for(model, mode, GREEDY, tree=BRANCHING, copy_tokens=copies) for mode in ("fused", "two_pass")
        )
        assert (fused.tokens_per_step, two_pass.tokens_per_step) == (longest + 1, longest + 2)
        assert fused.rows_per_step == BRANCHING.num_rows + copies
        assert two_pass.rows_per_step == 1 + 3 + 1 + BRANCHING.num_nodes + copies
