"""Grouped attention against torch's own with repeated keys and values; the base is the base for everybody else."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pardec.target.attention import (
    ROUTE,
    STOCK,
    AttentionRoute,
    group_rows,
    grouped_attention,
    grouped_attention_calls,
    query_group,
)

H, D, SLOTS = 2, 8, 13


class Layer(torch.nn.Module):
    """What transformers' sdpa reads of an attention layer."""

    is_causal = True

    def __init__(self, group: int):
        super().__init__()
        self.num_key_value_groups = group


def inputs(batch: int, group: int, rows: int, *, value_dim: int = D, seed: int = 0):
    """Queries, keys, values, and a mask of which every row sees something."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, H * group, D, dtype=torch.float64, generator=generator).transpose(1, 2)
    key = torch.randn(batch, H, SLOTS, D, dtype=torch.float64, generator=generator)
    value = torch.randn(batch, H, SLOTS, value_dim, dtype=torch.float64, generator=generator)
    visible = torch.rand(batch, 1, rows, SLOTS, generator=generator) < 0.4
    visible[..., 2] = True
    return query, key, value, visible


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("value_dim", [D, 12, 4])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_it_is_attention_over_keys_and_values_repeated_for_every_query_head(group, batch, rows, value_dim):
    query, key, value, visible = inputs(batch, group, rows, value_dim=value_dim)
    for scaling in (None, 0.7):
        mask = group_rows(visible, group, torch.float64)
        found, weights = grouped_attention(Layer(group), query, key, value, mask, scaling=scaling)
        repeated = (states.repeat_interleave(group, dim=1) for states in (key, value))
        expected = scaled_dot_product_attention(query, *repeated, attn_mask=visible, scale=scaling)
        assert found.shape == (batch, rows, H * group, value_dim)  # as the interface wants it
        assert weights is None
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [1, 3])
def test_a_row_is_the_weighted_mean_of_the_values_that_it_sees(group):
    query, key, value, visible = inputs(2, group, 3)
    found, _ = grouped_attention(Layer(group), query, key, value, group_rows(visible, group, torch.float64))
    for b in range(2):
        for head in range(H * group):
            for r in range(3):
                seen = [s for s in range(SLOTS) if visible[b, 0, r, s]]
                scores = torch.stack([query[b, head, r] @ key[b, head // group, s] / D**0.5 for s in seen])
                expected = scores.softmax(0) @ value[b, head // group, seen]
                torch.testing.assert_close(found[b, r, head], expected, rtol=1e-12, atol=1e-12)


def test_stacked_masks_repeat_the_rows_for_each_query_head_of_a_group():
    visible = torch.tensor([[[[True, False, True], [False, True, True]]]])
    inf = float("inf")
    rows = [[0.0, -inf, 0.0], [-inf, 0.0, 0.0]]
    assert group_rows(visible, 3, torch.float32).tolist() == [[rows * 3]]
    kinds = group_rows({"full_attention": visible, "sliding_attention": ~visible}, 1, torch.bfloat16)
    assert kinds["full_attention"].tolist() == [[rows]]
    assert kinds["sliding_attention"].tolist() == [[[[-inf, 0.0, -inf], [0.0, -inf, -inf]]]]
    assert kinds["full_attention"].dtype == torch.bfloat16


def test_the_group_is_read_from_the_configuration():
    assert query_group(tiny_model("llama")) == 2
    assert query_group(tiny_model("llama", num_key_value_heads=1)) == 4
    assert query_group(tiny_model("gpt2")) == 1
    for heads, kv_heads in ((4, [2, 4, 2]), (4, 3), (None, 2), (4, None)):
        text = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
        named_elsewhere = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder, text=text: text))
        assert query_group(named_elsewhere) == 1


# ---------------------------------------------------------------------- calls that are not a step


@pytest.mark.parametrize("group", [1, 2, 4])
def test_calls_without_a_stacked_mask_are_bitwise_those_of_stock_sdpa(group):
    query, key, value, visible = inputs(2, group, 4)
    square = visible[..., :4]
    square[..., range(4), range(4)] = True
    additive = torch.where(square, 0.0, float("-inf")).double()
    for mask in (None, square, square.expand(-1, H * group, -1, -1), additive):
        if group == 1 and mask is additive:
            continue  # for a group of one this is what a step looks like, and the same attention
        arguments = (Layer(group), query, key[:, :, :4], value[:, :, :4], mask)
        with grouped_attention_calls() as calls:
            found, _ = grouped_attention(*arguments, scaling=0.5)
        assert torch.equal(found, sdpa_attention_forward(*arguments, scaling=0.5)[0])
        assert calls == []


def test_a_bool_mask_of_as_many_rows_as_a_step_has_is_passed_on():
    """With one key/value head for each query head a step's mask has as many rows as anybody else's."""
    query, key, value, visible = inputs(2, 1, 5)
    with grouped_attention_calls() as calls:
        found, _ = grouped_attention(Layer(1), query, key, value, visible)
        assert calls == []
        grouped_attention(Layer(1), query, key, value, group_rows(visible, 1, torch.float64))
        assert len(calls) == 1
    assert torch.equal(found, sdpa_attention_forward(Layer(1), query, key, value, visible)[0])


def test_an_additive_mask_of_one_group_is_attention_with_that_mask():
    query, key, value, _ = inputs(2, 1, 5)
    additive = torch.randn(2, 1, 5, SLOTS, dtype=torch.float64)  # somebody else's, with numbers of its own
    found, _ = grouped_attention(Layer(1), query, key, value, additive)
    expected, _ = sdpa_attention_forward(Layer(1), query, key, value, additive)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the model outside of a step


def implementation(model) -> str:
    return model.config._attn_implementation


def test_the_route_is_on_inside_only():
    model = tiny_model("llama")
    before = model.config.to_dict()
    with AttentionRoute(model):
        assert implementation(model) == ROUTE
    assert implementation(model) == STOCK
    assert model.config.to_dict() == before


def test_an_exception_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    route = AttentionRoute(model)
    for _ in range(2):
        with pytest.raises(KeyError), route:
            raise KeyError
        assert implementation(model) == STOCK
    with route:
        assert implementation(model) == ROUTE
    assert implementation(model) == STOCK


def test_contexts_may_be_nested_and_of_several_objects():
    model, other = tiny_model("llama"), tiny_model("llama")
    with AttentionRoute(model):
        with AttentionRoute(model):
            assert implementation(other) == STOCK
        assert implementation(model) == ROUTE
    assert implementation(model) == STOCK


def test_contexts_may_overlap_in_two_threads():
    model = tiny_model("llama")
    route, seen = AttentionRoute(model), []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with route:
            inside.set()
            assert leave.wait(10)
            seen.append(implementation(model))  # the second has left already

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with AttentionRoute(model):  # enters second, leaves first
        seen.append(implementation(model))
    seen.append(implementation(model))
    leave.set()
    thread.join()
    assert seen == [ROUTE, ROUTE, ROUTE]
    assert implementation(model) == STOCK


def test_the_calls_of_other_threads_are_not_collected():
    query, key, value, visible = inputs(1, 2, 3)
    mask = group_rows(visible, 2, torch.float64)
    with grouped_attention_calls() as calls:
        thread = threading.Thread(target=grouped_attention, args=(Layer(2), query, key, value, mask))
        thread.start()
        thread.join()
        assert calls == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-mixed-windows", "phi3-window"])
def test_whoever_runs_the_base_meanwhile_gets_bitwise_its_own_numbers(family):
    """The prompt is shorter than every window, and not padded."""
    model = tiny_model(family, dtype=torch.float32)
    ids = torch.randint(1, 61, (2, 7))
    before = model(ids).logits
    tokens = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    with AttentionRoute(model):
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(model.generate(ids[:1], max_new_tokens=8, do_sample=False), tokens)
    assert torch.equal(model(ids).logits, before)
