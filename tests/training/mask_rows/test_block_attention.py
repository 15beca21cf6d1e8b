"""Mask rows attending block by block, against softmax over loops and against sdpa under one mask over all keys."""

import math
import threading

import pytest
import torch
from tiny_models import tiny_model

from pardec.layout import training_layout
from pardec.target.forward import TargetModel
from pardec.target.own_head import OwnHead
from pardec.target.prefix_cache import PrefixCache
from pardec.training.mask_rows import prefix_attention
from pardec.training.mask_rows.block_attention import BlockRoute, Blocks, block_attention, supports

T, H, G, D = 9, 2, 3, 8
LENGTHS = {"equal": (3, 3, 3), "falling": (3, 2, 1, 1), "with an empty one": (0, 2, 0, 3), "one": (4,)}


def make(lengths, seed=0):
    """Layout, queries, keys and values of T real tokens and M mask rows; the mask rows' own are leaves."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, T, (2, len(lengths)), generator=generator)
    layout = training_layout(anchors, lengths, T)
    M = sum(lengths)
    query, key, value = (
        torch.randn(2, heads, rows, D, generator=generator, dtype=torch.float64)
        for heads, rows in ((H * G, M), (H, T + M), (H, T + M))
    )
    real = key[:, :, :T], value[:, :, :T]
    learned = [x.clone().requires_grad_() for x in (query, key[:, :, T:], value[:, :, T:])]
    return layout, real, *learned


def through_the_route(layout, real, query, key, value, scaling=None, window=None):
    model = tiny_model("llama") if window is None else tiny_model("mistral-window", sliding_window=window)
    cache = PrefixCache(1)
    cache.update(*real, 0)
    target = TargetModel.wrap(model)
    route = BlockRoute.of(target, layout, layout, cache)
    with route.on(target):
        own = cache.update(key, value, 0)
        out, _ = block_attention(torch.nn.Module(), query, *own, route.mask, scaling=scaling)
    assert len(route.calls) == 1
    return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_row_is_a_softmax_over_its_prefix_and_its_own_block(lengths):
    layout, real, query, key, value = make(lengths)
    out = through_the_route(layout, real, query, key, value)
    assert out.shape == (2, sum(lengths), H * G, D)
    all_keys, all_values = torch.cat([real[0], key], 2).detach(), torch.cat([real[1], value], 2).detach()
    for b in range(2):
        for m in range(sum(lengths)):
            seen = layout.visible[b, m].nonzero().squeeze(1).tolist()
            for head in range(H * G):
                keys, values = all_keys[b, head // G], all_values[b, head // G]
                scores = [float((query[b, head, m] @ keys[s]).detach()) / math.sqrt(D) for s in seen]
                total = sum(math.exp(score) for score in scores)
                expected = sum(math.exp(x) / total * values[s] for x, s in zip(scores, seen, strict=True))
                torch.testing.assert_close(out[b, m, head], expected)


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_gradients_are_those_of_sdpa_under_one_mask(monkeypatch, lengths, scaling, window, rows_at_once):
    monkeypatch.setattr(prefix_attention, "_ENTRIES_ON_CPU", 0)
    monkeypatch.setattr(prefix_attention, "_LEAST_ROWS", rows_at_once)
    weights = torch.randn(2, sum(lengths), H * G, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layout, real, *learned = make(lengths)
    out = through_the_route(layout, real, *learned, scaling, window)
    (out * weights).sum().backward()

    _, _, *others = make(lengths)
    query, key, value = others
    positions = torch.cat([torch.arange(T).expand(2, -1), layout.positions], dim=1)
    near = layout.positions[:, :, None] - positions[:, None] < (window or 10**6)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([real[0], key], 2),
        torch.cat([real[1], value], 2),
        attn_mask=(layout.visible & near)[:, None],
        scale=scaling,
        enable_gqa=True,
    )
    (expected.transpose(1, 2) * weights).sum().backward()
    torch.testing.assert_close(out, expected.transpose(1, 2))
    for one, other in zip(learned, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_nothing_of_the_size_of_rows_times_real_tokens_is_kept_and_no_prefix_is_copied():
    layout, real, *learned = make((3, 2, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        through_the_route(layout, real, *learned)
    of_prefix = {x.untyped_storage().data_ptr() for x in kept if x.shape[2:3] == (T,)}
    assert of_prefix == {x.untyped_storage().data_ptr() for x in real}
    assert not any(T in x.shape[3:] for x in kept)


def test_slices_look_at_no_more_tokens_than_one_of_their_rows_sees():
    layout = training_layout(torch.tensor([[0, 2, 7], [1, 3, 8]]), (2, 2, 2), T)
    seen = prefix_attention.Seen.of(layout, layout, None)
    assert [(one.tokens, one.all_see) for one in seen.slices(2)] == [
        (slice(0, 2), 1),
        (slice(0, 4), 3),
        (slice(0, 9), 8),
    ]
    near = prefix_attention.Seen.of(layout, layout, 3)
    assert [one.tokens for one in near.slices(2)] == [slice(0, 2), slice(1, 4), slice(6, 9)]


def test_rows_are_spread_over_blocks_and_gathered_again():
    layout, _, query, _, _ = make((3, 1, 2))
    blocks = Blocks.of(layout)
    spread = blocks.spread(query)
    assert spread.shape == (2, H * G, 3, 3, D)
    assert torch.equal(blocks.gather(spread), query)


def of_family(family: str, **changes) -> OwnHead:
    return OwnHead.of(TargetModel.wrap(tiny_model(family, **changes)))


def test_a_model_that_runs_meanwhile_in_another_thread_keeps_its_own_attention():
    model = tiny_model("llama")
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    layout, *_ = make((2, 2))
    found = []
    target = TargetModel.wrap(model)
    with BlockRoute.of(target, layout, layout, PrefixCache(3)).on(target):
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert model.config._attn_implementation == "sdpa"


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_model("qwen3-mixed-windows")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    assert supports(OwnHead.of(TargetModel.wrap(model)), 4)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "phi3-window", "gpt2", "granite", "opt", "gpt_neox"])
def test_models_with_sdpa_take_the_route(family):
    assert supports(of_family(family), 4)


@pytest.mark.parametrize("family", ["llama-eager", "gemma2-eager"])
def test_models_with_another_attention_keep_it(family):
    assert not supports(of_family(family), 4)


def test_windows_that_end_inside_a_block_keep_the_models_own_attention():
    target = of_family("mistral-window")  # of 8 tokens
    assert supports(target, 7)
    assert not supports(target, 8)


def test_a_model_with_hardly_any_positions_keeps_its_own_attention():
    assert not supports(of_family("llama", max_position_embeddings=8), 4)


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
    assert not supports(OwnHead.of(TargetModel.wrap(model)), 4)
