"""What only a CUDA device can show of a sharded base: weights that come and go on its streams; `pytest -m gpu`."""

import pytest
import torch
from tiny_models import make_adapter
from torch import distributed

from pardec.model import SelfSpeculativeModel
from pardec.target.base import load_base
from pardec.target.sharding import load_sharded_base
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.peft_lora import inject_lora

pytestmark = pytest.mark.gpu
ROWS = [[5, 9, 2, 7, 7, 1], [3, 8, 8], [4, 4, 6, 1, 2, 9, 3, 5, 11]]


@pytest.fixture
def alone():
    """A group of one process, whose shard is everything: what is brought in and freed is the same."""
    store = distributed.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    """A base in float32: in bfloat16 a whole one, whose layers share products, rounds in another order."""
    load_base("tiny-python", device="cpu", dtype="float32").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def losses(base, steps: int) -> list[float]:
    torch.manual_seed(0)
    inject_lora(base, r=4, alpha=8, target_modules="all-linear")
    trainer = MaskTokenTrainer(base, Drafter(3, has_lora=True, head_width=16))
    learned = [p for p in trainer.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(learned, lr=1e-4), []
    ids = torch.arange(64, device="cuda").view(2, 32) * 3
    anchors = torch.arange(8, device="cuda").expand(2, -1) * 3
    for _ in range(steps):
        loss, _, _ = trainer(ids, torch.ones_like(ids, dtype=torch.bool), anchors)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_a_sharded_base_decodes_and_learns_what_a_whole_one_does(alone, folder):
    whole, base = load_base(folder, device="cuda"), load_sharded_base(folder, torch.device("cuda", 0))
    assert {tensor.device.type for tensor in (*base.parameters(), *base.buffers())} == {"cuda"}
    assert base.dtype == whole.dtype == torch.float32
    adapter = make_adapter(whole, 2, lora_rank=2)
    models = [SelfSpeculativeModel(one, None, adapter) for one in (whole, base)]
    assert not models[1].capture
    models[0].capture = False
    for law in ({}, {"temperature": 0.8, "seed": 1}):
        found = [model.generate(ROWS, max_new_tokens=12, **law).token_ids for model in models]
        assert found[0] == found[1]
    assert losses(base, 3) == pytest.approx(losses(whole, 3), rel=1e-3)
