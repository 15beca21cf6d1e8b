"""Ranks of drafts against a loop of full forwards, one for each place, and against what the decoder accepts."""

import pytest
import torch
from tiny_models import make_adapter, tiny_model

import pardec.decoding.prefill
import pardec.measures.place_rows
import pardec.measures.ranks
from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.measures.ranks import TOP, measure_ranks, summarise_ranks
from pardec.model import SelfSpeculativeModel
from pardec.target.hidden import HiddenTap

K, V = 3, 13
PROMPTS = [[5, 9, 2, 4, 7, 7, 3], [3], [11, 12, 10, 1, 2, 3, 4, 0, 5, 6, 7, 8]]


def model_of(family: str = "llama", **adapter) -> SelfSpeculativeModel:
    """A random model of so few tokens that drafts of a random adapter are often right."""
    base = tiny_model(family, vocab_size=V)
    return SelfSpeculativeModel(base, None, make_adapter(base, K, **adapter))


def sampled(model: SelfSpeculativeModel, max_new_tokens: int) -> list[list[int]]:
    return model.generate(PROMPTS, mode="plain", max_new_tokens=max_new_tokens, temperature=2.0, seed=0).token_ids


def naive_ranks(model: SelfSpeculativeModel, prompts, continuations, stride: int, use_head: bool = True):
    """A full forward of prefix and block, without a cache, for every place; ranks of the tokens that exist."""
    base, adapter, found = model.base_model, model.adapter, []
    noise = NoiseTokens.of(base.config.vocab_size, torch.device("cpu"))
    gate = None if adapter.lora is None else LoraGate(base, adapter.lora)
    for prompt, continuation in zip(prompts, continuations, strict=True):
        whole = prompt + continuation
        for place in range(len(prompt) - 1, len(whole), stride):
            prefix, n = torch.tensor([whole[: place + 1]]), place + 1
            depth = max(min(K, len(whole) - place - 2), 0)  # mask tokens with something to predict
            if adapter.mask_embeddings is None:
                depths = torch.arange(depth)
                block = base.get_input_embeddings()(noise.at(n + depths[None], depths))
            else:
                block = adapter.mask_embeddings.expand(K, -1).double()[None, :depth]
            embeds = torch.cat([base.get_input_embeddings()(prefix), block], dim=1)
            tap = HiddenTap(base)
            with torch.no_grad(), tap.attached():
                if gate is None:
                    logits = base(inputs_embeds=embeds).logits[0, n:]
                else:
                    with gate.attached(), gate.open(slice(n, n + depth), 1, n + depth):
                        logits = base(inputs_embeds=embeds).logits[0, n:]
                hidden = tap.hidden[0, n:]
            row = [-1] * K
            for j in range(depth):
                scores, wanted = logits[j], whole[n + j + 1]
                if adapter.head is not None and use_head:
                    scores = head_scores(model, logits[j], hidden[j], whole[n + j])
                likeliest = scores.argsort(descending=True).tolist()
                row[j] = V if scores[wanted] == float("-inf") else likeliest.index(wanted)
            found.append(row)
    return found


def head_scores(model: SelfSpeculativeModel, logits, hidden, previous: int):
    """What the head makes of one row, written out."""
    base, weights = model.base_model, {name: w.double() for name, w in model.adapter.head.items()}
    embedded = base.get_input_embeddings().weight[previous]
    unit = [x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() for x in (hidden, embedded)]
    inner = weights["inner.weight"] @ torch.cat(unit) + weights["inner.bias"]
    vector = weights["outer.weight"] @ (inner * torch.sigmoid(inner))
    best = logits.argsort(descending=True)[: model.adapter.metadata.head.shortlist]
    scores = torch.full_like(logits, float("-inf"))
    scores[best] = logits[best] + base.get_output_embeddings().weight[best] @ vector
    return scores


def expected(rows: list[list[int]]) -> dict:
    """Shares counted one by one."""
    figures = {"unconditional": {}, "conditional": {}, "num_places": [], "num_reached": []}
    for j in range(K):
        there = [row[j] for row in rows if row[j] >= 0]
        reached = [row[j] for row in rows if row[j] >= 0 and all(rank == 0 for rank in row[:j])]
        figures["num_places"].append(len(there))
        figures["num_reached"].append(len(reached))
        for name, ranks in (("unconditional", there), ("conditional", reached)):
            for n in TOP:
                share = sum(rank < n for rank in ranks) / max(len(ranks), 1)
                figures[name].setdefault(n, []).append(share)
    return figures


def assert_equal(found, rows: list[list[int]]) -> None:
    wanted = expected(rows)
    assert found.num_places == wanted["num_places"]
    assert found.num_reached == wanted["num_reached"]
    for name in ("unconditional", "conditional"):
        for n in TOP:
            assert getattr(found, name)[n] == pytest.approx(wanted[name][n], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "lora", "sharing", "stride"),
    [
        ("llama", True, "distinct", 1),
        ("llama-eager", False, "shared", 2),
        ("qwen3-mixed-windows", True, "shared", 1),
        ("mistral-window", False, "distinct", 3),
        ("gpt2", True, "distinct", 2),
        ("granite", True, "distinct", 1),
    ],
)
def test_ranks_are_those_of_a_full_forward_for_every_place(family, lora, sharing, stride, monkeypatch):
    monkeypatch.setattr(
        pardec.measures.place_rows, "_BLOCKS_PER_FORWARD", 4
    )  # several forwards, the last of them not full
    model = model_of(family, lora_rank=2 if lora else 0, mask_sharing=sharing)
    continuations = [tokens[:n] for tokens, n in zip(sampled(model, 41), (41, 23, 1), strict=True)]
    found = measure_ranks(model, PROMPTS, continuations, stride=stride, batch_size=2)
    assert_equal(found, naive_ranks(model, PROMPTS, continuations, stride))
    assert found.num_reached[1] > 0
    assert 0 < found.unconditional[10][1] < 1


def test_prompts_that_are_prefilled_in_chunks_give_the_same(monkeypatch):
    model = model_of(lora_rank=2)
    continuations = sampled(model, 12)
    whole = measure_ranks(model, PROMPTS, continuations)
    monkeypatch.setattr(pardec.decoding.prefill, "_TOKENS_PER_FORWARD", 4)
    monkeypatch.setattr(pardec.decoding.prefill, "_MIN_CHUNK_TOKENS", 4)
    assert measure_ranks(model, PROMPTS, continuations) == whole


def test_continuations_may_end_at_the_models_last_position():
    base = tiny_model("gpt2", vocab_size=V, n_positions=32)
    model = SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))
    continuations = [tokens[: 32 - len(prompt)] for prompt, tokens in zip(PROMPTS, sampled(model, 20), strict=True)]
    assert len(PROMPTS[2] + continuations[2]) == 32
    assert_equal(measure_ranks(model, PROMPTS, continuations), naive_ranks(model, PROMPTS, continuations, 1))


def test_random_tokens_at_mask_rows_are_those_of_the_decoder():
    model = model_of(lora_rank=2, draft_input="uniform_noise")
    continuations = sampled(model, 12)
    assert_equal(measure_ranks(model, PROMPTS, continuations), naive_ranks(model, PROMPTS, continuations, 1))


def test_a_sampler_head_is_told_the_true_token_before():
    model = model_of(lora_rank=2, head_width=8, shortlist=7)
    continuations = sampled(model, 20)
    found = measure_ranks(model, PROMPTS, continuations)
    rows = naive_ranks(model, PROMPTS, continuations, 1)
    assert_equal(found, rows)
    # what is not among the 7 that are scored has no place among 10
    assert {rank for row in rows for rank in row} == {-1, *range(7), V}
    without = measure_ranks(model, PROMPTS, continuations, use_head=False)
    assert_equal(without, naive_ranks(model, PROMPTS, continuations, 1, use_head=False))
    assert without != found


@pytest.mark.parametrize("head_width", [0, 8])
def test_drafts_are_accepted_as_far_as_they_rank_first(head_width):
    """Greedy rounds of the decoder begin at known places, and accept the leading tokens of rank 0 there."""
    model = model_of(lora_rank=2, head_width=head_width, shortlist=9)
    out = model.generate(PROMPTS, max_new_tokens=30)
    seen, everything = [], []
    for prompt, tokens, counts in zip(PROMPTS, out.token_ids, out.counts, strict=True):
        rows, place = naive_ranks(model, [prompt], [tokens], 1), 0
        everything += rows
        for accepted in counts.accepted:
            row = rows[place]
            if min(row) >= 0:  # the continuation is long enough to tell
                assert accepted == next((j for j in range(K) if row[j] != 0), K)
                seen.append(accepted)
            place += accepted + 1
    assert len(seen) > 25
    assert max(seen) > 0
    assert_equal(measure_ranks(model, PROMPTS, out.token_ids), everything)


def test_of_equal_scores_the_first_counts_as_likelier():
    scores = torch.tensor([1.0, 2.0, 2.0, float("-inf")]).expand(1, 4, 1, 4)
    wanted = torch.tensor([[[0], [1], [2], [3]]])
    assert pardec.measures.ranks._ranks(scores, wanted).flatten().tolist() == [2, 0, 1, 4]
    assert pardec.measures.ranks._ranks(scores, -torch.ones_like(wanted)).flatten().tolist() == [-1] * 4


def test_shares_by_hand():
    ranks = torch.tensor([[0, 0, 4], [0, 7, 0], [3, 0, 0], [0, 0, -1], [12, -1, -1]])
    found = summarise_ranks(ranks)
    assert found.num_places == [5, 4, 3]
    assert found.unconditional[1] == pytest.approx([3 / 5, 3 / 4, 2 / 3])
    assert found.unconditional[5] == pytest.approx([4 / 5, 3 / 4, 3 / 3])
    assert found.unconditional[10] == pytest.approx([4 / 5, 4 / 4, 3 / 3])
    assert found.num_reached == [5, 3, 1]
    assert found.conditional[1] == pytest.approx([3 / 5, 2 / 3, 0])
    assert found.conditional[5] == pytest.approx([4 / 5, 2 / 3, 1])
    assert found.to_dict()["conditional"]["top10"] == [0.8, 1.0, 1.0]


def test_the_base_and_the_callers_random_numbers_are_left_alone():
    model = model_of(lora_rank=2, head_width=8, shortlist=7)
    before, state = sampled(model, 8), torch.get_rng_state()
    measure_ranks(model, PROMPTS, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.base_model.modules())
    assert sampled(model, 8) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"continuations": [[1]]}, "continuations: expected one for each of some prompts, found 1 for 3"),
        ({"prompts": [], "continuations": []}, "found 0 for 0"),
        ({"stride": 0}, "stride: expected an integer >= 1, found 0"),
        ({"use_head": True}, "use_head: expected an adapter with a sampler head, found none"),
        ({"num_speculative_tokens": K + 1}, "num_speculative_tokens: expected at most 3"),
    ],
)
def test_what_cannot_be_ranked_is_refused(options, words):
    model = model_of()
    arguments = {"prompts": PROMPTS, "continuations": [[1, 2]] * 3, **options}
    with pytest.raises(ValueError, match=words):
        measure_ranks(model, arguments.pop("prompts"), arguments.pop("continuations"), **arguments)


def test_a_model_without_an_adapter_has_no_ranks():
    with pytest.raises(ValueError, match="expected one with an adapter, found none"):
        measure_ranks(SelfSpeculativeModel(tiny_model("llama"), None, None), PROMPTS, [[1]] * 3)
