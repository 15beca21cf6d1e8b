"""The count of launches and bytes: what is one, what is none, what waits for the device or comes from the host."""

import pytest
import torch
from timing.launches import counted_step
from torch.nn.functional import embedding, scaled_dot_product_attention

BF16 = {"dtype": torch.bfloat16, "device": "meta"}


def counted(run):
    with counted_step() as count:
        run()
    return count


@pytest.fixture
def x():
    return torch.empty(4, 6, **BF16)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.view(2, 12)[:, None].transpose(0, 1).expand(5, -1, -1)[0],
        lambda x: x.reshape(3, 8).unflatten(1, (2, 4)).detach(),
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(3, 3),
        lambda x: x.to(torch.bfloat16).contiguous(),
        lambda x: x[None, :, 2:].shape,
    ],
)
def test_views_and_allocations_launch_nothing(x, run):
    count = counted(lambda: run(x))
    assert count.num_launches == 0
    assert count.num_bytes == 0


@pytest.mark.parametrize(
    ("run", "num_bytes"),
    [
        (lambda x: torch.zeros_like(x), 48),
        (lambda x: x.t().contiguous(), 96),
        (lambda x: x.float(), 48 + 96),
        (lambda x: x + x, 3 * 48),
        (lambda x: x.add_(1), 96),
        (lambda x: x @ x.t(), 2 * 48 + 32),
        (lambda x: x[:, :1].expand(4, 6) + x, 8 + 2 * 48),  # what is expanded is read once
        (lambda x: torch.cat([x, x]), 4 * 48),
        (lambda x: torch.nn.functional.linear(x[None], x), 2 * 48 + 32),
    ],
)
def test_every_other_operation_is_one_launch_that_reads_and_writes(x, run, num_bytes):
    count = counted(lambda: run(x))
    assert count.num_launches == 1
    assert count.num_bytes == num_bytes
    assert count.asked == count.on_host == []


def test_of_what_is_indexed_only_the_rows_count():
    table, index = torch.empty(1000, 8, **BF16), torch.empty(3, dtype=torch.long, device="meta")
    rows = torch.empty(3, 8, **BF16)
    assert counted(lambda: embedding(index, table)).num_bytes == 24 + 2 * 48
    assert counted(lambda: table.index_select(0, index)).num_bytes == 24 + 2 * 48
    assert counted(lambda: table[index]).num_bytes == 24 + 2 * 48
    assert counted(lambda: table.index_copy_(0, index, rows)).num_bytes == 24 + 2 * 48


def test_attention_is_one_launch_and_its_mask_is_kept():
    query, key = torch.empty(1, 2, 5, 8, **BF16), torch.empty(1, 2, 32, 8, **BF16)
    mask = torch.empty(1, 1, 5, 32, **BF16)
    count = counted(lambda: scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=0.5))
    assert count.num_launches == 1
    assert count.num_bytes >= 2 * (2 * query.numel() + 2 * key.numel() + mask.numel())
    assert count.masks[0] is mask
    assert count.queries[0] is query


@pytest.mark.parametrize("ask", [lambda x: x[0, 0].item(), lambda x: bool(x[0, 0]), lambda x: x.nonzero()])
def test_asking_for_a_value_is_seen(x, ask):
    with counted_step() as count, pytest.raises((RuntimeError, NotImplementedError)):
        ask(x)
    assert len(count.asked) == 1


@pytest.mark.parametrize(
    "bring",
    [
        lambda x: x * torch.tensor([2.0], device="meta"),
        lambda x: x * x.new_tensor([2.0]),
        lambda x: x + torch.ones(()),
        lambda x: torch.ones(3).to("meta"),
        lambda x: x[:, [0, 2]],
        lambda x: x[[0, 2]],
    ],
)
def test_what_comes_from_the_host_is_seen(x, bring):
    assert counted(lambda: bring(x)).on_host
    assert not counted(lambda: x * 2.0).on_host
