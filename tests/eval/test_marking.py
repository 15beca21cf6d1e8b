"""Marked responses: what is drawn follows the decoder's law, and training and responding read what is left."""

import itertools
import json

import marking
import numpy as np
import pytest
import torch
from data_samples import write_jsonl
from programs import run

import pardec
from pardec.data.reading import training_rows
from pardec.data.responses.response_prompts import draw_prompts

V, K = 3, 2


def test_accepted_drafts_behind_texts_are_as_many_as_of_drafts_that_are_verified():
    """Both laws by enumeration of texts and of drafts; the rule of each draft written out."""
    source, draw, samples = np.random.default_rng(0), torch.Generator().manual_seed(0), 20_000
    pasts = [past for k in range(K) for past in itertools.product(range(V), repeat=k)]
    p, q = ({past: source.dirichlet(np.ones(V)) for past in pasts} for _ in "pq")
    expected, found = np.zeros(K + 1), np.zeros(K + 1)
    for x in itertools.product(range(V), repeat=K):
        P, Q = ([law[x[:k]][x[k]] for k in range(K)] for law in (p, q))
        accept = [min(1.0, P[k] / Q[k]) for k in range(K)]
        first, both = accept[0], accept[0] * accept[1]
        expected += np.prod(Q) * np.array([1 - first, first - both, both])
        laws = [torch.tensor(np.stack([law[x[:k]] for k in range(K)])).expand(samples, K, V) for law in (p, q)]
        lengths = marking.accepted_prefix(*laws, torch.tensor(x).expand(samples, K), draw)
        found += np.prod(P) * np.bincount(lengths.numpy(), minlength=K + 1) / samples
    assert found == pytest.approx(expected, abs=0.01)  # standard error below 0.004
    assert abs(expected[0] - expected[1]) > 0.05


def test_places_that_decoding_drafts_behind_are_a_step_from_each_other():
    accepted = torch.tensor([[2, 0, 0, 1, 4, 0, 0], [0, 0, 3, 0, 0, 0, 1]])
    assert marking.visited(accepted).int().tolist() == [[1, 0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1]]


@pytest.fixture(scope="module")
def own_texts(adapters, tmp_path_factory):
    """Responses of the packaged model as its program writes them."""
    model = pardec.load(adapters / "lora")
    prompts = [[9, 12, 7 + n] for n in range(6)]
    out = model.generate(prompts, mode="plain", max_new_tokens=17, temperature=0.8, top_k=10, seed=1)
    rows = [
        {"input_ids": prompt + new, "loss_mask": [0] * 3 + [1] * 17}
        for prompt, new in zip(prompts, out.token_ids, strict=True)
    ]
    return write_jsonl(tmp_path_factory.mktemp("responses") / "own.jsonl", rows), rows


@pytest.mark.parametrize("kind", [marking.FAILED, marking.VISITED])
def test_marks_stand_where_drafts_do(kind, adapters, own_texts, tokenizer, tmp_path):
    path, rows = own_texts
    marked, prompts = tmp_path / "marked.jsonl", tmp_path / "again" / "prompts.jsonl"
    options = ("--output", marked, "--mark", kind, "--again", prompts, "--num-texts", 6)
    ended = run(marking.main, adapters / "lora", path, *options)
    assert ended.code == 0, ended.err[-2000:]
    found = [json.loads(line) for line in marked.read_text().splitlines()]
    assert [{key: row[key] for key in ("input_ids", "loss_mask")} for row in found] == rows
    places = ended.result["places"]
    for row in found:
        assert len(row["marked"]) == 20
        assert not any(row["marked"][:2] + row["marked"][2 + places :])
        assert kind == marking.FAILED or row["marked"][2]  # decoding drafts behind the prompt
    share = sum(sum(row["marked"]) for row in found) / (6 * places)
    assert share == pytest.approx(ended.result[f"share_{kind}"], abs=1e-4)
    # a random adapter, whose drafts are rejected nearly always
    assert ended.result["mean_accepted_drafts"] < 1
    asked = draw_prompts(training_rows(str(prompts)), tokenizer, num_prompts=3, prompt_tokens=3, max_prompt_tokens=3)
    texts = [row["input_ids"] for row in rows]
    for prompt in asked:
        assert any(prompt == text[n : n + 3] for text in texts for n in range(places))


def test_an_adapter_is_expected(own_texts, tmp_path):
    ended = run(marking.main, "tiny-python", own_texts[0], "--output", tmp_path / "marked.jsonl")
    assert "expected an adapter" in ended.error
