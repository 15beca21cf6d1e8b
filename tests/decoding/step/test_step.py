"""Exactness of the step loop: token for token when greedy, against transformers' own generate."""

import pytest
import torch
from covering import every_pair
from greedy_oracle import PROMPT_LENGTHS, plain_generate, prompts, tokens_of_generate
from planted_drafts import PlantedDrafts
from tiny_models import FAMILIES, make_adapter, tiny_model

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel

K = 3
NEW_TOKENS = 26


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return tiny_model(request.param), prompts(61), tokens_of_generate(request.param, 61, NEW_TOKENS + K + 3)


def decoder_for(model, mode: str, law: TokenLaw, *, lora_rank: int = 2, new_tokens: int = NEW_TOKENS) -> Decoder:
    target = TargetModel.wrap(model)
    adapter = make_adapter(model, K, lora_rank=lora_rank)
    gate = LoraGate(model, adapter.lora) if lora_rank else None
    masks = adapter.mask_embeddings.to(target.dtype)
    return Decoder(RowForward(target, masks, gate), mode, K, law, new_tokens, torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "mode", "shift", "batch"),
    every_pair(list(FAMILIES), ["fused", "two_pass"], range(K + 1), [1, 4]),
    indirect=["family"],
)
def test_planted_drafts_are_accepted_and_tokens_equal_generate(family, mode, shift, batch):
    model, rows, references = family
    rows, references = rows[:batch], references[:batch]
    num_planted = [(shift + b) % (K + 1) for b in range(batch)]  # another number in every row
    decoder = decoder_for(model, mode, TokenLaw(greedy=True))
    state, counts = run_planted(decoder, rows, references, num_planted)
    assert counts == num_planted
    assert [row[:NEW_TOKENS] for row in references] == state.output[:, :NEW_TOKENS].tolist()
    per_round = 2 if mode == "two_pass" else 1
    assert [len(rounds) for rounds in state.rounds()] == [-(-(NEW_TOKENS - 1) // (n + per_round)) for n in num_planted]


def run_planted(decoder: Decoder, rows, references, num_planted):
    """Decodes with the first num_planted[b] drafts of row b true and the others false.

    Returns the state and the number accepted in every row, which must be the same in each of its rounds.
    """
    plan = PlantedDrafts(decoder, references, num_planted)
    with torch.no_grad(), decoder.forward.gate.attached():
        plan.state = state = decoder.prefill(rows)
        while not state.done.all():
            if decoder.mode == "fused":
                state.drafts = plan.drafts()
            decoder.step(state)
    accepted = [{a for a, _ in rounds} for rounds in state.rounds()]
    assert all(len(counts) == 1 for counts in accepted)
    return state, [counts.pop() for counts in accepted]


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_own_drafts_give_generates_tokens_in_ragged_batches(family, mode):
    model, rows, references = family
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    out = ours.generate(rows, max_new_tokens=NEW_TOKENS, mode=mode)
    assert out.token_ids == [row[:NEW_TOKENS] for row in references]


def test_real_rows_are_bitwise_unchanged_by_lora_and_mask_embeddings(family):
    model, rows, references = family
    seen = []
    for lora_rank, scale in ((0, 1.0), (2, 1.0), (2, 50.0)):
        decoder = decoder_for(model, "fused", TokenLaw(greedy=True), lora_rank=lora_rank)
        decoder.forward.mask_embeddings = decoder.forward.mask_embeddings * scale
        decoder.__post_init__()
        gate = decoder.forward.gate
        with torch.no_grad():
            handles = gate.attached() if gate else None
            if handles:
                handles.__enter__()
            state = decoder.prefill(rows)
            state.bonus = torch.tensor([reference[0] for reference in references])
            state.drafts = torch.tensor([reference[1 : K + 1] for reference in references])
            logits = decoder.step_logits(state)
            if handles:
                handles.__exit__(None, None, None)
        slots = (torch.tensor(PROMPT_LENGTHS)[:, None] + torch.arange(K + 1)).tolist()
        cached = [
            layer.keys[b][:, : PROMPT_LENGTHS[b]].clone() for layer in state.cache.layers for b in range(len(rows))
        ] + [layer.values[b][:, slots[b]].clone() for layer in state.cache.layers for b in range(len(rows))]
        seen.append((logits[:, : K + 1], cached, logits[:, K + 1 :]))
    for logits, cached, mask_logits in seen[1:]:
        assert torch.equal(logits, seen[0][0])
        assert all(torch.equal(a, b) for a, b in zip(cached, seen[0][1], strict=True))
        assert not torch.allclose(mask_logits, seen[0][2])  # what must make a difference does


def test_the_base_behaves_as_before_after_fused_decoding(family):
    model, rows, _ = family
    ids = torch.tensor([rows[0]])
    before = model(ids).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)).generate(rows, max_new_tokens=5)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_float32_packaged_model_gives_generates_tokens(tiny_base, tokenizer):
    from pardec.data.corpus import standard_prompts
    from pardec.data.python_sources import python_sources, stdlib_folder
    from pardec.data.tokenising import tokenise

    texts = list(python_sources(stdlib_folder(), "validation"))[:6]
    rows = standard_prompts([one for text in texts for one in tokenise({"text": text}, tokenizer)], num_prompts=4)
    rows = [row[: 128 - 9 * i] for i, row in enumerate(rows)]
    ours = SelfSpeculativeModel(tiny_base, tokenizer, make_adapter(tiny_base, K, lora_rank=4))
    references = [plain_generate(tiny_base, row, 48) for row in rows]
    for mode in ("plain", "two_pass", "fused"):
        out = ours.generate(rows, max_new_tokens=48, mode=mode)
        for row, reference, found in zip(rows, references, out.token_ids, strict=True):
            if found != reference:
                gap = top_two_gap(tiny_base, row, reference, found)
                print(f"{mode}: tokens differ where the two best logits are {gap:.2e} apart")
                assert gap < 1e-4


def top_two_gap(model, prompt: list[int], reference: list[int], found: list[int]) -> float:
    """Gap between the two best logits at the first token that differs."""
    first = next(i for i, (a, b) in enumerate(zip(reference, found, strict=False)) if a != b)
    logits = model(torch.tensor([prompt + reference[:first]])).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


# ---------------------------------------------------------------------- ends


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    row = prompts(61)[0]
    return model, row, plain_generate(model, row, 40)


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
def test_eos_ends_a_sequence_wherever_it_falls_in_an_accepted_run(llama, mode):
    model, row, reference = llama
    for end in range(12):
        eos = [reference[end], 60 if 60 not in reference else 59]  # several ids
        expected = plain_generate(model, row, 40, eos_token_id=eos, pad_token_id=0)
        decoder = decoder_for(model, mode, TokenLaw(greedy=True), new_tokens=40)
        decoder.eos_token_ids = torch.tensor(eos)
        if len(expected) == 1:
            state = decoder.prefill([row])
        else:
            state, counts = run_planted(decoder, [row], [reference], [K])
            assert counts == [K]
        assert bool(state.done.all())
        assert state.output[0, : int(state.num_new[0])].tolist() == expected


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
@pytest.mark.parametrize("limit", range(1, 12))
def test_length_limit_cuts_inside_an_accepted_run(llama, mode, limit):
    model, row, reference = llama
    decoder = decoder_for(model, mode, TokenLaw(greedy=True), new_tokens=limit)
    if limit == 1:
        assert decoder.prefill([row]).done.all()
        return
    state, counts = run_planted(decoder, [row], [reference], [K])
    assert counts == [K]
    assert state.output[0, : int(state.num_new[0])].tolist() == reference[:limit]


def test_rows_near_the_last_position_stay_exact():
    model = tiny_model("gpt2", n_positions=32)
    row = prompts(61)[0]
    reference = plain_generate(model, row, 32 - len(row))
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 5))
    for mode in ("plain", "two_pass", "fused"):
        assert ours.generate([row], max_new_tokens=32 - len(row), mode=mode).token_ids == [reference]


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
def test_dead_drafts_are_ignored(llama, mode, monkeypatch):
    model, row, reference = llama
    decoder = decoder_for(model, mode, TokenLaw(greedy=True), new_tokens=20)
    for length in range(K + 1):
        with torch.no_grad():
            state = decoder.prefill([row])
            state.draft_length = torch.tensor([length])
            state.drafts = torch.tensor([reference[1 : K + 1]])
            if mode == "two_pass":
                monkeypatch.setattr(TokenLaw, "draw", lambda self, logits: (torch.tensor([reference[2 : K + 2]]), None))
            decoder.step(state)
            monkeypatch.undo()
        assert state.rounds()[0][0] == (length, length)
        emitted = int(state.num_new[0])
        assert state.output[0, :emitted].tolist() == reference[:emitted]


def test_plain_mode_calls_no_adapter_code(llama, monkeypatch):
    model, row, reference = llama
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))

    def forbidden(*args, **kwargs):
        raise AssertionError("adapter code ran in plain mode")

    from pardec.adapters import adapter, gated_lora

    monkeypatch.setattr(gated_lora.LoraGate, "attached", forbidden)
    monkeypatch.setattr(gated_lora.LoraGate, "_make_hook", forbidden)
    monkeypatch.setattr(adapter.Adapter, "embeddings_for", forbidden)
    out = ours.generate([row], max_new_tokens=20, mode="plain")
    assert out.token_ids == [reference[:20]]
    with pytest.raises(AssertionError, match="adapter code ran"):
        ours.generate([row], max_new_tokens=20, mode="fused")


def test_two_pass_tokens_per_forward_follow_the_published_count(llama):
    model, row, _ = llama
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    out = ours.generate([row], max_new_tokens=40, mode="two_pass")
    a = out.stats.mean_acceptance_length - 1
    assert out.stats.tokens_per_forward == pytest.approx((2 + a) / 2)
