"""Rows of pruned chains against plain forwards of what each row sees, and decoding with them against generate."""

import itertools
import math
from collections import Counter

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from row_oracle import committed, logits_of
from sampling_oracle import (
    PROMPT,
    WARPERS,
    Z_LIMIT,
    assert_same_law,
    chi_square_z,
    emitted_law,
    extended,
    joint_law,
    recorded_step,
    thin_model,
)
from tiny_models import make_adapter, tiny_model

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.output import counts_of
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.layout import block_layout, chain_layout, real_layout
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel
from pardec.target.survey import survey

V = 61
BLOCKS = [(0,), (1, 0), (1, 1), (2, 1, 0), (2, 1, 1), (2, 2, 2), (0, 2, 1), (3, 2, 1, 1), (3, 0, 0, 0)]
FAMILIES = ["llama", "gemma3-mixed-windows", "gpt2", "llama-eager"]


def target_of(model, routed: bool) -> tuple[TargetModel, int | None]:
    target = TargetModel.wrap(model)
    return target, survey(target).query_group if routed else None


# ---------------------------------------------------------------------- one forward


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_pruned_chain_is_a_plain_forward_of_what_it_sees(family, routed):
    model = tiny_model(family)
    target, group = target_of(model, routed)
    close = 1e-5 if target.attention.additive else 1e-9  # eager attention takes its softmax in float32
    rows = prompts(V, (11, 3, 6))
    lengths = torch.tensor([len(row) for row in rows])
    for block_lengths in ((2, 1, 0), (0, 2, 1), (3, 0, 0, 0), (0,)):
        K = len(block_lengths) - 1
        masks = make_adapter(model, max(K, 1)).mask_embeddings[:K].to(target.dtype) * 3
        drafts = torch.arange(1, len(rows) * (K + 1) + 1).view(len(rows), K + 1) * 5 % V
        forward = RowForward(target, masks, query_group=group)
        plan = forward.plan(chain_layout(block_lengths))
        with torch.no_grad():
            logits = forward.run(plan, committed(target, rows, 40), lengths, drafts)
        for b, row in enumerate(rows):
            found = iter(logits[b])
            for i in range(K + 1):
                real = [*row, *drafts[b, : i + 1].tolist()]
                torch.testing.assert_close(next(found), logits_of(model, real, masks[:0]), rtol=close, atol=close)
            for i, length in enumerate(block_lengths):
                real = [*row, *drafts[b, : i + 1].tolist()]
                for j in range(1, length + 1):
                    torch.testing.assert_close(next(found), logits_of(model, real, masks[:j]), rtol=close, atol=close)
            assert next(found, None) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_behind_the_used_ones_make_no_difference(family):
    """For any number of slots that covers the rows: what lies behind them is stale in any case."""
    model = tiny_model(family)
    target, group = target_of(model, routed=True)
    rows = prompts(V, (11, 3))
    masks = make_adapter(model, 2).mask_embeddings.to(target.dtype)
    forward = RowForward(target, masks, query_group=group)
    plan = forward.plan(chain_layout((2, 1, 0)))
    seen = []
    for num_used in (17, 18, 29, 64):  # the longest row and 6 rows of the chain; all that is allocated
        cache = committed(target, rows, 64)
        cache.num_used = num_used
        with torch.no_grad():
            ids = torch.tensor([[5, 3, 8], [1, 2, 3]])
            seen.append(forward.run(plan, cache, torch.tensor([11, 3]), ids))
    for logits in seen[1:]:
        torch.testing.assert_close(logits, seen[0], rtol=1e-10, atol=1e-10)


def test_one_object_serves_layouts_and_caches_of_every_size():
    """What it keeps from a forward to the next must fit whatever comes."""
    model = tiny_model("llama")
    target, group = target_of(model, routed=True)
    masks = make_adapter(model, 2).mask_embeddings.to(target.dtype)
    shared = RowForward(target, masks, query_group=group)
    layouts = (chain_layout((2, 0, 1)), block_layout(2), real_layout(3))
    for num_slots, layout in itertools.product((24, 80, 32), layouts):
        ids = torch.tensor([[5, 3, 8][: layout.num_real]])
        logits = []
        for forward in (shared, RowForward(target, masks, query_group=group)):
            cache = committed(target, [[4, 9, 2, 2]], num_slots)
            with torch.no_grad():
                logits.append(forward.run(forward.plan(layout), cache, torch.tensor([4]), ids))
        assert torch.equal(*logits)


def test_rows_that_cannot_be_emitted_may_lie_beyond_the_models_positions():
    model = tiny_model("gpt2", n_positions=16)
    target, group = target_of(model, routed=True)
    masks = make_adapter(model, 3).mask_embeddings.to(target.dtype)
    forward = RowForward(target, masks, query_group=group)
    rows = prompts(V, (13,))
    with torch.no_grad():
        plan = forward.plan(chain_layout((3, 3, 3, 3)))
        logits = forward.run(plan, committed(target, rows, 40), torch.tensor([13]), torch.tensor([[5, 3, 8, 1]]))
    for i in range(3):  # positions 13, 14 and 15 exist
        expected = logits_of(model, rows[0] + [5, 3, 8, 1][: i + 1], masks[:0])
        torch.testing.assert_close(logits[0, i], expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- greedy decoding


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = tiny_model(request.param)
    rows = prompts(V)
    return model, rows, [plain_generate(model, row, 30) for row in rows]


def pruned_decoder(model, block_lengths, *, new_tokens: int = 20, routed: bool = True) -> Decoder:
    target, group = target_of(model, routed)
    K, no_eos = len(block_lengths) - 1, torch.empty(0, dtype=torch.long)
    if K == 0:
        return Decoder(RowForward(target, query_group=group), "plain", 0, TokenLaw(greedy=True), new_tokens, no_eos)
    adapter = make_adapter(model, K, lora_rank=2)
    masks, gate = adapter.mask_embeddings.to(target.dtype), LoraGate(model, adapter.lora)
    forward = RowForward(target, masks, gate, query_group=group)
    return Decoder(forward, "fused", K, TokenLaw(greedy=True), new_tokens, no_eos, block_lengths)


def run_planted(decoder: Decoder, rows, references, num_true):
    """Decodes with the first num_true[b] drafts of row b true and the others false, whatever the model drafts."""
    K = decoder.num_speculative_tokens
    with decoder.attached():
        state = decoder.prefill(rows)
        while not state.done.all():
            drafts = []
            for b, reference in enumerate(references):
                start = int(state.num_new[b])
                truth = (reference + [0] * K)[start : start + K]
                drafts.append([t if i < num_true[b] else (t + 1) % V for i, t in enumerate(truth)])
            state.drafts = torch.tensor(drafts, dtype=torch.long).view(len(rows), K)
            decoder.step(state)
    return state


@pytest.mark.parametrize("block_lengths", BLOCKS, ids=str)
def test_as_many_drafts_are_verified_as_the_block_behind_the_accepted_ones_has(family, block_lengths):
    model, rows, references = family
    K = len(block_lengths) - 1
    num_true = [b % (K + 1) for b in range(len(rows))]  # four rows, so every number
    state = run_planted(pruned_decoder(model, block_lengths), rows, references, num_true)
    assert state.output[:, :20].tolist() == [reference[:20] for reference in references]
    counts = counts_of(state, "fused", len(rows))
    for b, true in enumerate(num_true):
        drafted, accepted, new, length = [], [], 1, K  # prefill drafts one full block
        while new < 20:
            drafted.append(length)
            accepted.append(min(true, length))
            new += accepted[-1] + 1
            length = block_lengths[accepted[-1]]
        assert counts[b].drafted == drafted
        assert counts[b].accepted == accepted


@pytest.mark.parametrize("block_lengths", [b for b in BLOCKS if max(b) == len(b) - 1], ids=str)
def test_own_drafts_of_pruned_chains_give_generates_tokens(family, block_lengths):
    model, rows, references = family
    ours = SelfSpeculativeModel(model, None, make_adapter(model, max(len(block_lengths) - 1, 1), lora_rank=2))
    out = ours.generate(rows, max_new_tokens=24, block_lengths=block_lengths)
    assert out.token_ids == [reference[:24] for reference in references]
    later = [length for one in out.counts for length in one.drafted[1:]]
    assert set(later) <= set(block_lengths)


def test_a_pruned_chain_drafts_what_the_full_one_drafts_where_it_drafts(family):
    """Rows that are left out change nothing for those that stay."""
    model, rows, references = family
    seen = {}
    for block_lengths in ((3, 3, 3, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        decoder = pruned_decoder(model, block_lengths)
        with decoder.attached():
            state = decoder.prefill(rows)
            first_b_true = [[*reference[1 : b + 1], *[60] * (3 - b)] for b, reference in enumerate(references)]
            state.drafts = torch.tensor(first_b_true)
            decoder.step(state)
        assert [one.accepted for one in counts_of(state, "fused", len(rows))] == [[0], [1], [2], [3]]
        assert state.draft_length.tolist() == list(block_lengths)
        seen[block_lengths] = [row[:n] for row, n in zip(state.drafts.tolist(), block_lengths, strict=True)]
    full = seen.pop((3, 3, 3, 3))
    for drafts in seen.values():
        assert all(row == whole[: len(row)] for row, whole in zip(drafts, full, strict=True))


# ---------------------------------------------------------------------- sampled decoding


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=5, seed=3)


@pytest.mark.parametrize("draft_length", [0, 1, 2])
@pytest.mark.parametrize("block_lengths", [(2, 1, 0), (0, 0, 2)], ids=str)
def test_a_step_of_a_pruned_chain_emits_the_targets_law(toy, block_lengths, draft_length, monkeypatch):
    """By enumeration of all drafts, acceptance counts and bonus tokens."""
    options = WARPERS["all"]
    law = TokenLaw(False, tuple(make_warpers(**options)))
    masks = make_adapter(toy, 2).mask_embeddings.double() * 3
    target, group = target_of(toy, routed=True)
    forward = RowForward(target, masks, query_group=group)
    decoder = Decoder(forward, "fused", 2, law, 16, torch.empty(0, dtype=torch.long), block_lengths)
    drafts = torch.tensor(list(itertools.product(range(5), repeat=2)))
    state = decoder.prefill([PROMPT] * len(drafts))
    state.bonus = torch.full((len(drafts),), 2)
    state.drafts, state.draft_length = drafts, torch.full((len(drafts),), draft_length)
    ((p, q, given, length),) = recorded_step(decoder, state, monkeypatch)
    weights = [math.prod(float(q[0, k, d]) for k, d in enumerate(row)) for row in drafts.tolist()]
    emitted = emitted_law(p, q, given, length, weights)
    assert max(len(tokens) for tokens, weight in emitted.items() if weight > 0) == draft_length + 1
    prefix = [*PROMPT, 2]
    assert_same_law(extended(toy, emitted, prefix, 3, options), joint_law(toy, prefix, 3, options))


@pytest.fixture(scope="module")
def thin():
    return thin_model()


@pytest.fixture(scope="module")
def law_of_five(thin):
    return joint_law(thin, PROMPT, 5, WARPERS["temperature"])


@pytest.mark.parametrize("block_lengths", [(1, 0), (2, 1, 0), (0, 1, 2)], ids=str)
def test_sampling_with_pruned_chains_follows_the_targets_law(thin, law_of_five, block_lengths):
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, len(block_lengths) - 1, lora_rank=2))
    out = ours.generate(
        [PROMPT], max_new_tokens=5, seed=0, num_return_sequences=4000, block_lengths=block_lengths,
        **WARPERS["temperature"],
    )  # fmt: skip
    assert set().union(*(one.drafted[1:] for one in out.counts)) == set(block_lengths)
    counts = Counter(tuple(tokens) for tokens in out.token_ids)
    assert chi_square_z(counts, law_of_five) < Z_LIMIT
