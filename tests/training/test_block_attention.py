"""Mask rows attending block by block, against softmax over loops and against sdpa under one mask over all keys."""

import math
import threading

import pytest
import torch
from tiny_models import tiny_model

from pardec.layout import training_layout
from pardec.target.forward import TargetModel
from pardec.training.block_attention import Blocks, block_attention, block_route, real_bias, supports

T, H, G, D = 9, 2, 3, 8
LENGTHS = {"equal": (3, 3, 3), "falling": (3, 2, 1, 1), "with an empty one": (0, 2, 0, 3), "one": (4,)}


def make(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, T, (2, len(lengths)), generator=generator)
    layout = training_layout(anchors, lengths, T)
    M = sum(lengths)
    query, key, value = (
        torch.randn(2, heads, rows, D, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, rows in ((H * G, M), (H, T + M), (H, T + M))
    )
    return layout, query, key, value


def through_the_route(layout, query, key, value, scaling=None):
    target = TargetModel.wrap(tiny_model("llama"))
    bias = real_bias(target, layout, torch.float64)
    with block_route(target, layout) as calls:
        out, _ = block_attention(torch.nn.Module(), query, key, value, bias, scaling=scaling)
    assert len(calls) == 1
    return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_row_is_a_softmax_over_its_prefix_and_its_own_block(lengths):
    layout, query, key, value = make(lengths)
    out = through_the_route(layout, query, key, value)
    assert out.shape == (2, sum(lengths), H * G, D)
    for b in range(2):
        for m in range(sum(lengths)):
            seen = layout.visible[b, m].nonzero().squeeze(1).tolist()
            for head in range(H * G):
                keys, values = key[b, head // G], value[b, head // G]
                scores = [float((query[b, head, m] @ keys[s]).detach()) / math.sqrt(D) for s in seen]
                total = sum(math.exp(score) for score in scores)
                expected = sum(math.exp(x) / total * values[s] for x, s in zip(scores, seen, strict=True))
                torch.testing.assert_close(out[b, m, head], expected)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_gradients_are_those_of_sdpa_under_one_mask(lengths, scaling):
    layout, query, key, value = make(lengths)
    weights = torch.randn(2, sum(lengths), H * G, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (through_the_route(layout, query, key, value, scaling) * weights).sum().backward()
    found = [x.grad for x in (query, key, value)]
    layout, query, key, value = make(lengths)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.visible[:, None], scale=scaling, enable_gqa=True
    )
    (expected.transpose(1, 2) * weights).sum().backward()
    for one, other in zip(found, (query, key, value), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_rows_are_spread_over_blocks_and_gathered_again():
    layout, query, _, _ = make((3, 1, 2))
    blocks = Blocks.of(layout)
    spread = blocks.spread(query)
    assert spread.shape == (2, H * G, 3, 3, D)
    assert torch.equal(blocks.gather(spread), query)


def test_a_model_that_runs_meanwhile_in_another_thread_keeps_its_own_attention():
    model = tiny_model("llama")
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    layout, *_ = make((2, 2))
    found = []
    with block_route(TargetModel.wrap(model), layout):
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert model.config._attn_implementation == "sdpa"


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_model("qwen3-mixed-windows")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    assert supports(TargetModel.wrap(model), 4)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "phi3-window", "gpt2", "granite", "opt", "gpt_neox"])
def test_models_with_sdpa_take_the_route(family):
    assert supports(TargetModel.wrap(tiny_model(family)), 4)


@pytest.mark.parametrize("family", ["llama-eager", "gemma2-eager"])
def test_models_with_another_attention_keep_it(family):
    assert not supports(TargetModel.wrap(tiny_model(family)), 4)


def test_windows_that_end_inside_a_block_keep_the_models_own_attention():
    target = TargetModel.wrap(tiny_model("mistral-window"))  # of 8 tokens
    assert supports(target, 7)
    assert not supports(target, 8)


def test_a_model_with_hardly_any_positions_keeps_its_own_attention():
    assert not supports(TargetModel.wrap(tiny_model("llama", max_position_embeddings=8)), 4)


def test_a_model_that_changes_scores_in_its_attention_is_found_out():
    """Soft-capped scores, say: the route would leave that out, and the probe must see it."""
    from transformers import AttentionInterface

    model = tiny_model("llama")
    for layer in model.model.layers:
        project = layer.self_attn.q_proj.forward
        # stands for a model that is not what its configuration says: its own attention gets other queries
        layer.self_attn.q_proj.forward = lambda x, run=project, owner=model: (
            run(x) * (3.0 if owner.config._attn_implementation == "sdpa" else 1.0)
        )
    assert "sdpa" in AttentionInterface._global_mapping
    assert not supports(TargetModel.wrap(model), 4)
