"""A LoRA on layers that run several projections as one acts as on each projection alone, at open rows only."""

import pytest
import torch
from torch import nn

from pardec.vllm_plugin.gated_linear import GatedLinear, by_layer, stacked

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
IN, R = 6, 2
SIZES = (8, 4, 4)


class VllmLinear(nn.Module):
    """Gives output and bias, as vLLM's linear layers do."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x), None


def pair(out: int):
    return torch.randn(R, IN), torch.randn(out, R)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("missing", [(), (0,), (1, 2)])
def test_a_packed_layer_adds_each_projection_s_product_at_open_rows(missing):
    pairs = [None if place in missing else pair(size) for place, size in enumerate(SIZES)]
    a, b = stacked("qkv_proj", pairs, sizes=SIZES, width=IN, scaling=0.5)
    base, x, gate = VllmLinear(nn.Linear(IN, sum(SIZES))), torch.randn(5, IN), torch.tensor([0, 1, 1, 0, 1, 9.0, 9])
    found, bias = GatedLinear(base, a, b, gate[:, None])(x)
    products = [
        x.new_zeros(5, size) if one is None else 0.5 * x @ one[0].T @ one[1].T
        for one, size in zip(pairs, SIZES, strict=True)
    ]
    expected = base(x)[0] + gate[:5, None] * torch.cat(products, dim=1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 3]], base(x)[0][[0, 3]])  # closed rows, bit for bit
    assert bias is None


def test_projections_are_found_in_the_layer_that_runs_them():
    q, up, down = pair(8), pair(4), pair(4)
    names = {"layers.0.self_attn.q_proj": q, "layers.0.mlp.up_proj": up, "layers.1.mlp.down_proj": down}
    assert by_layer(names, PACKED) == {
        "layers.0.self_attn.qkv_proj": [q, None, None],
        "layers.0.mlp.gate_up_proj": [None, up],
        "layers.1.mlp.down_proj": [down],
    }


def test_a_projection_that_the_base_packs_itself_is_one():
    whole = pair(sum(SIZES))
    assert by_layer({"layers.0.qkv_proj": whole}, {"qkv_proj": ["qkv_proj"]}) == {"layers.0.qkv_proj": [whole]}
    a, b = stacked("qkv_proj", [whole], sizes=SIZES, width=IN, scaling=2.0)
    torch.testing.assert_close(a @ b, 2 * whole[0].T @ whole[1].T)


def test_a_pair_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match=r"lora: x\.qkv_proj: expected \[\(8, 6\)\] features, found \[\(9, 6\)\]"):
        stacked("x.qkv_proj", [pair(9), None, None], sizes=SIZES, width=IN, scaling=1.0)
