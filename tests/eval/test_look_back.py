"""Heads on recorded drafts: what is recorded is what decoding sees, and expected lengths are those of enumeration."""

import itertools
import json

import look_back
import numpy as np
import pytest
import torch
from programs import run
from studies.accepted_lengths import accepted_lengths
from studies.head_trials import Scorer
from studies.look_back_head import LookBackHead
from studies.recorded_drafts import record
from torch import nn

import pardec
from pardec.adapters.files import save_adapter
from pardec.adapters.head import SamplerHead
from pardec.decoding.drafting import draft_in_turn
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.layout import block_layout
from pardec.measures.futures import Places
from pardec.target.hidden import HiddenTap
from pardec.target.own_head import OwnHead

V, K = 3, 3


def enumerated(p, q) -> dict[str, float]:
    """Expected accepted drafts by verification: every draft, every number of accepted ones, the rules written out."""
    expected = {"token": 0.0, "block": 0.0}
    for x in itertools.product(range(V), repeat=K):
        P, Q = [p[x[:i]] for i in range(K)], [q[x[:i]] for i in range(K)]
        drawn = np.prod([Q[i][x[i]] for i in range(K)])
        accept = [min(1.0, P[i][x[i]] / Q[i][x[i]]) for i in range(K)]
        expected["token"] += drawn * sum(np.prod(accept[: t + 1]) for t in range(K))
        r = [1.0]
        for i in range(K):
            r.append(min(1.0, r[i] * P[i][x[i]] / Q[i][x[i]]))
        accept = [1.0]
        for t in range(1, K):
            rest = np.maximum(r[t] * P[t] - Q[t], 0).sum()
            accept.append(rest / (rest + 1 - r[t]) if rest + 1 - r[t] > 0 else 1.0)
        accept.append(r[K])
        left = 1.0
        for t in range(K, -1, -1):  # the largest that holds counts
            expected["block"] += drawn * left * accept[t] * t
            left *= 1 - accept[t]
    return expected


@pytest.mark.parametrize("sharpness", [0.3, 1.0])
def test_expected_lengths_are_those_of_every_draft_verified(sharpness):
    source = np.random.default_rng(0)
    pasts = [past for t in range(K) for past in itertools.product(range(V), repeat=t)]
    p, q = ({past: source.dirichlet(np.full(V, sharpness)) for past in pasts} for _ in "pq")
    expected, found = enumerated(p, q), {"token": 0.0, "block": 0.0}
    for x in itertools.product(range(V), repeat=K):
        laws = [torch.tensor(np.stack([law[x[:i]] for i in range(K)])) for law in (p, q)]
        weight = np.prod([p[x[:i]][x[i]] for i in range(K)])
        for name, length in accepted_lengths(*laws, torch.tensor(x)).items():
            found[name] += weight * float(length)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found["block"] > found["token"]


@pytest.fixture(scope="module")
def seen(adapters):
    """The model with a LoRA, three texts of 20 tokens of its own, and what was recorded of them."""
    model = pardec.load(adapters / "lora")
    law = {"temperature": 0.8, "top_k": 10, "seed": 1}
    out = model.generate([[9, 12, 7]] * 3, mode="plain", max_new_tokens=17, **law)
    return model, record(model, torch.tensor([[9, 12, 7, *new] for new in out.token_ids]), 2, 5)


def test_recorded_rows_are_those_that_decoding_runs(seen):
    model, found = seen
    forward = model.engines.row_forward(2, None)
    forward = type(forward)(forward.target, forward.mask_embeddings, forward.gate, tap=HiddenTap(model.base_model))
    for n, m in itertools.product(range(3), range(5)):
        end = int(found.anchors[n, m]) + 1
        with forward.attached(), torch.no_grad():
            places = Places.behind(forward, TokenLaw(True), [found.ids[n, :end].tolist()], 3)
            places.run(block_layout(2), torch.empty(1, 0, dtype=torch.long))
        torch.testing.assert_close(found.drafts[n, m], forward.hidden[0, 1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.text[n, end - 1], forward.hidden[0, 0], rtol=1e-4, atol=1e-4)
    assert (found.behind[..., 0] == found.anchors + 1).all()


def test_more_places_than_a_text_has_are_refused(seen):
    model, found = seen
    with pytest.raises(ValueError, match="num_anchors: expected at most 15, the places of these texts, found 16"):
        record(model, found.ids, 2, 16)


def scorer_of(model, shortlist: int) -> Scorer:
    # random numbers draft what no top-k of the model's keeps
    law = TokenLaw(False, tuple(make_warpers(3.0, None, None, None)))
    return Scorer(OwnHead.of(model.target), HiddenTap(model.base_model), law, shortlist)


def moved(head: nn.Module) -> nn.Module:
    """The same head, correcting something."""
    torch.manual_seed(0)
    for weight in head.parameters():
        nn.init.normal_(weight, std=0.1)
    return head.requires_grad_(False)


@pytest.mark.parametrize("kind", [SamplerHead, LookBackHead])
def test_a_new_head_accepts_what_none_does(seen, kind):
    model, found = seen
    none = scorer_of(model, 4096).lengths(None, found)
    new = scorer_of(model, 4096).lengths(kind(256, 256, 16).requires_grad_(False), found)
    for name in none:
        torch.testing.assert_close(new[name], none[name], rtol=1e-5, atol=1e-7)
    other = scorer_of(model, 4096).lengths(moved(kind(256, 256, 16)), found)
    assert not torch.allclose(other["token"], none["token"], rtol=1e-3)


def test_a_head_is_judged_by_the_law_that_it_drafts_by(seen):
    model, found = seen
    head, scorer = moved(SamplerHead(256, 256, 16)), scorer_of(model, 8)
    law = TokenLaw(False, scorer.law.processors, torch.Generator().manual_seed(0))
    expected = torch.zeros(3, dtype=torch.float64)
    logits = scorer.draft_logits(found).unflatten(1, (5, 2))
    target = law.probs(scorer.target_logits(found)).unflatten(1, (5, 2)).double()
    for n, m in itertools.product(range(3), range(5)):
        reached = 1.0
        for j in range(2):
            behind = int(found.behind[n, m, j])
            _, q = draft_in_turn(
                head, law, logits[n, m, j][None, None], found.drafts[n, m, j][None, None], found.ids[n, behind][None],
                model.target.embed, scorer.tap.output_embeddings, 8,
            )  # fmt: skip
            p, token = target[n, m, j], found.ids[n, behind + 1]
            expected[n] += reached * p.minimum(q[0, 0].double()).sum()
            reached *= min(1.0, float(q[0, 0, token] / p[token]))
    found_lengths = scorer.lengths(head, found.part(torch.arange(3)))["token"]
    torch.testing.assert_close(found_lengths, expected / 5, rtol=1e-4, atol=1e-6)


def test_no_row_looks_behind_its_anchor(seen):
    model, found = seen
    head, scorer = moved(LookBackHead(256, 256, 16)), scorer_of(model, 8)
    before = scorer.corrections(head, found).unflatten(1, (5, 2))
    found.text[:, 10:] += 1.0
    after = scorer.corrections(head, found).unflatten(1, (5, 2))
    found.text[:, 10:] -= 1.0
    is_before = found.anchors < 10
    assert is_before.any()
    assert not is_before.all()
    torch.testing.assert_close(after[is_before], before[is_before])
    assert not torch.allclose(after[~is_before], before[~is_before])


def test_program_compares_heads_and_verifications_on_the_same_drafts(adapters, tmp_path):
    source = np.random.default_rng(0)
    rows = [{"input_ids": source.integers(4096, size=30).tolist(), "loss_mask": [0] * 6 + [1] * 24} for _ in range(8)]
    rows.insert(3, {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (adapters / "lora", tmp_path / "own.jsonl", "--quick", "--output", tmp_path / "found")
    ended = run(look_back.main, *arguments)
    assert ended.code == 0, ended.err[-2000:]
    rows = {(row["head"], row["verification"]): row for row in ended.result["rows"]}
    assert len(rows) == 8
    wider, looking = (rows[name, "token"]["numbers"] for name in (look_back.WIDER, look_back.LOOKS_BACK))
    assert wider == pytest.approx(looking, rel=0.01)
    for head in (look_back.NONE, look_back.SAMPLER, look_back.WIDER, look_back.LOOKS_BACK):
        token, block = (rows[head, way]["mean_acceptance_length"] for way in ("token", "block"))
        assert rows[head, "block"]["to_token"]["value"] == pytest.approx(block / token - 1, abs=2e-4)
    page = (tmp_path / "found.md").read_text()
    assert page.startswith("# Heads that look back")
    assert "K = 2: 3 prompts of python-stdlib (validation), 4 places each" in page


def test_texts_count_by_the_steps_that_they_take():
    # 12 tokens of a text that accepts one draft a step take 6 steps, of one that accepts three 3 steps
    assert look_back.pooled(np.array([1.0, 3.0])) == pytest.approx(24 / 9)
    found = look_back.ratio(np.array([1.0, 3.0]), np.array([0.0, 3.0]))
    assert found["value"] == pytest.approx((24 / 9) / (24 / 15) - 1, abs=1e-5)
    assert found["interval"] == pytest.approx([0.0, 1.0])


def test_responses_of_another_form_are_refused(adapters, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "def f(): pass"}\n')
    ended = run(look_back.main, adapters / "lora", tmp_path / "text.jsonl", "--quick")
    assert "expected rows with input_ids and loss_mask, found text" in ended.error
    (tmp_path / "few.jsonl").write_text('{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n')
    ended = run(look_back.main, adapters / "lora", tmp_path / "few.jsonl", "--quick")
    assert "expected 6 rows of 3 tokens, as the first one is, found 1" in ended.error
    assert "expected a file to train heads on, or --steps 0" in run(look_back.main, adapters / "lora", "--quick").error


def test_without_steps_the_adapters_own_drafts_are_judged(packaged_adapter, tmp_path):
    save_adapter(packaged_adapter(2, head_width=4), tmp_path / "head")
    sizes = ("--num-prompts", 2, "--num-anchors", 3, "--max-new-tokens", 12)
    ended = run(look_back.main, tmp_path / "head", "--steps", 0, *sizes, "--output", tmp_path / "found")
    assert ended.code == 0, ended.err[-2000:]
    rows = ended.result["rows"]
    assert [row["head"] for row in rows[::2]] == [look_back.NONE, look_back.OWN]
    assert all(row["to_sampler_head"] is None for row in rows)
    assert rows[2]["numbers"] == 4 * (512 + 1 + 256)
