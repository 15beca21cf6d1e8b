"""Random tokens at mask rows: where they come from, and decoding with them against plain forwards and generate."""

import itertools
import math

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from row_oracle import committed
from tiny_models import make_adapter, tiny_model

import pardec
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.decoding import prefill
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.layout import MAX_SPECULATIVE_TOKENS, chain_layout, full_blocks
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel
from pardec.target.survey import survey

V, K = 61, 3
CPU = torch.device("cpu")
FAMILIES = ["llama", "gemma3-mixed-windows", "gpt2", "opt", "llama-eager"]


def noisy(model, **options) -> SelfSpeculativeModel:
    adapter = make_adapter(model, K, lora_rank=2, draft_input="uniform_noise", **options)
    return SelfSpeculativeModel(model, None, adapter)


# ---------------------------------------------------------------------- the table


def test_the_table_is_always_the_same():
    """An adapter that was measured once must draft the same wherever and whenever it is loaded."""
    table = NoiseTokens.of(4096, CPU).table
    assert torch.equal(table, NoiseTokens.of(4096, CPU).table)
    assert table[0, :4].tolist() == [2732, 2607, 1653, 3264]
    state = torch.get_rng_state()
    NoiseTokens.of(4096, CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_ids_are_uniform_over_the_vocabulary():
    ids = NoiseTokens.of(V, CPU).table.flatten()
    counts = torch.bincount(ids, minlength=V)
    assert len(counts) == V
    expected = len(ids) / V
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (V - 1)) < 4 * math.sqrt(2 * (V - 1))


def test_ids_follow_from_position_and_depth_alone():
    noise, depths = NoiseTokens.of(V, CPU), torch.tensor([0, 1, 2, 63, 64])
    positions = torch.tensor([[0, 1, 2, 3, 4], [4, 1023, 1024, 5000, 100_000]])
    found = noise.at(positions, depths)
    for b, m in itertools.product(range(2), range(5)):
        assert int(found[b, m]) == int(noise.table[int(positions[b, m]) % 1024, int(depths[m]) % 64])


@pytest.mark.parametrize("num_speculative_tokens", [1, 4, MAX_SPECULATIVE_TOKENS])
def test_no_two_rows_of_a_forward_read_the_same_place(num_speculative_tokens):
    layout = chain_layout(full_blocks(num_speculative_tokens))
    places = NoiseTokens(torch.arange(1024 * 64).view(1024, 64))
    ids = places.at(1000 + layout.offsets[None, layout.num_real :], layout.mask_indices)
    assert ids.unique().numel() == ids.numel() == (num_speculative_tokens + 1) * num_speculative_tokens


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_rows_are_plain_forwards_of_random_tokens(family, routed):
    """Without a LoRA a block is nothing but text that goes on at random."""
    model = tiny_model(family)
    target, noise = TargetModel.wrap(model), NoiseTokens.of(V, CPU)
    close = 1e-5 if target.attention.additive else 1e-9  # eager attention takes its softmax in float32
    rows, block_lengths = prompts(V, (11, 3, 6)), (2, 1, 3, 0)
    drafts = torch.arange(1, 13).view(3, 4) * 5 % V
    forward = RowForward(target, query_group=survey(target).query_group if routed else None, noise=noise)
    plan = forward.plan(chain_layout(block_lengths))
    with torch.no_grad():
        for batch in (slice(0, 3), slice(1, 2)):  # one sequence goes another way
            lengths = torch.tensor([len(row) for row in rows[batch]])
            logits = forward.run(plan, committed(target, rows[batch], 40), lengths, drafts[batch])
            for b, row in enumerate(rows[batch]):
                found = iter(logits[b, 4:])
                for i, length in enumerate(block_lengths):
                    real = [*row, *drafts[batch][b, : i + 1].tolist()]
                    ids = [int(noise.table[len(real) + j, j]) for j in range(length)]
                    for j in range(1, length + 1):
                        expected = model(torch.tensor([real + ids[:j]]), use_cache=False).logits[0, -1]
                        torch.testing.assert_close(next(found), expected, rtol=close, atol=close)


def decoder_for(model, mode: str, *, new_tokens: int = 12) -> Decoder:
    ours = noisy(model)
    gate, noise = LoraGate(model, ours.adapter.lora), NoiseTokens.of(V, CPU)
    no_eos = torch.empty(0, dtype=torch.long)
    forward = RowForward(TargetModel.wrap(model), gate=gate, noise=noise)
    return Decoder(forward, mode, K, TokenLaw(True), new_tokens, no_eos)


@pytest.mark.parametrize("chunked", [False, True])
def test_prefill_and_steps_draft_the_same_behind_the_same_tokens(chunked, monkeypatch):
    """The noise behind a token does not depend on which forward drafts there."""
    if chunked:
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 4)
        monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)
    model = tiny_model("llama")
    rows = prompts(V, (11, 3, 6))
    decoder = decoder_for(model, "fused")
    with torch.no_grad(), decoder.attached():
        whole = decoder.prefill(rows)
        shorter = decoder.prefill([row[:-1] for row in rows])
        shorter.bonus = torch.tensor([row[-1] for row in rows])
        shorter.drafts = ((whole.bonus + 1) % V)[:, None].expand(-1, K)  # false, so none is accepted
        decoder.step(shorter)
    two_pass = decoder_for(model, "two_pass")
    with torch.no_grad(), two_pass.attached():
        state = two_pass.prefill([row[:-1] for row in rows])
        state.bonus = torch.tensor([row[-1] for row in rows])
        two_pass.step(state)
    assert shorter.num_accepted.tolist() == [0, 0, 0]
    assert torch.equal(shorter.bonus, whole.bonus)
    assert torch.equal(shorter.drafts, whole.drafts)
    assert torch.equal(state.drafts, whole.drafts)
    assert len({tuple(row) for row in whole.drafts.tolist()}) > 1


def test_drafts_behind_the_last_token_go_through_the_lora():
    model = tiny_model("llama")
    row = prompts(V, (11,))[0]
    decoder, noise = decoder_for(model, "fused"), NoiseTokens.of(V, CPU)
    ids = torch.tensor([row + [int(noise.table[11 + j, j]) for j in range(K)]])
    with torch.no_grad():
        state = decoder.prefill([row])
        with decoder.forward.gate.attached(), decoder.forward.gate.open(slice(11, 11 + K), 1, 11 + K):
            expected = model(ids, use_cache=False).logits[0, 11:].argmax(dim=-1)
        without = model(ids, use_cache=False).logits[0, 11:].argmax(dim=-1)
    assert state.drafts[0].tolist() == expected.tolist() != without.tolist()


# ---------------------------------------------------------------------- whole calls


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = tiny_model(request.param)
    rows = prompts(V)
    return model, rows, [plain_generate(model, row, 24) for row in rows]


@pytest.mark.parametrize("head_width", [0, 6])
@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_tokens_are_generates_own(family, mode, head_width):
    model, rows, references = family
    ours = noisy(model, head_width=head_width)
    assert ours.generate(rows, max_new_tokens=24, mode=mode).token_ids == references
    assert ours.generate(rows[0], max_new_tokens=24, mode=mode).token_ids == references[:1]


def test_any_number_of_tokens_may_be_drafted():
    model = tiny_model("llama")
    rows = prompts(V)
    expected = [plain_generate(model, row, 12) for row in rows]
    for options in (
        {"num_speculative_tokens": 1},
        {"num_speculative_tokens": K + 2},
        {"block_lengths": (4, 2, 1, 0, 1)},
    ):
        out = noisy(model).generate(rows, max_new_tokens=12, **options)
        assert out.token_ids == expected
        assert out.stats.num_drafts > 0


def test_counts_are_the_same_in_every_process_and_batch():
    """No random numbers are drawn: only positions decide what stands at mask rows."""
    model = tiny_model("llama")
    rows = prompts(V)
    torch.manual_seed(0)
    first = noisy(model).generate(rows, max_new_tokens=24)
    torch.manual_seed(1)
    second = noisy(model).generate(rows, max_new_tokens=24)
    alone = [noisy(model).generate(row, max_new_tokens=24).counts[0].accepted for row in rows]
    assert [one.accepted for one in first.counts] == [one.accepted for one in second.counts] == alone
    assert sum(map(sum, alone)) > 0


def test_an_adapter_of_noise_loads_and_drafts(tiny_base, tokenizer, packaged_adapter, tmp_path):
    save_adapter(packaged_adapter(K, lora_rank=2, draft_input="uniform_noise"), tmp_path)
    model = pardec.load(tmp_path, base=tiny_base)
    prompt = tokenizer("def main():\n").input_ids
    out = model.generate(prompt, max_new_tokens=16)
    assert out.token_ids == [plain_generate(tiny_base, prompt, 16)]
    assert out.counts[0].drafted[0] == K
