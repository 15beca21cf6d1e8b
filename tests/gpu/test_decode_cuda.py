"""What only a CUDA device can show; run with `pytest -m gpu`."""

import pytest
import torch
from greedy_oracle import plain_generate
from tiny_models import FAMILIES, make_adapter, tiny_model
from tree_samples import BRANCHING, CROOKED, DYNAMIC

from pardec.model import SelfSpeculativeModel
from pardec.target.base import load_base
from pardec.training.module import Drafter, MaskTokenTrainer

pytestmark = pytest.mark.gpu
ROWS = [[5, 9, 2, 7, 7, 1], [3, 8, 8], [4, 4, 6, 1, 2, 9, 3, 5, 11]]


@pytest.fixture(autouse=True)
def exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_float64_tokens_equal_generate(family, mode):
    model = tiny_model(family).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2))
    found = ours.generate(ROWS, max_new_tokens=24, mode=mode).token_ids
    assert found == [plain_generate(model, row, 24) for row in ROWS]


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("head_width", [0, 6])
@pytest.mark.parametrize("mode", ["two_pass", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2"])
def test_float64_tokens_of_trees_equal_generate(family, mode, head_width, captured):
    """Of few tokens, so that walks leave the first branch: nodes are moved, in captured steps whatever they are."""
    model = tiny_model(family, vocab_size=7).cuda()
    rows = [[1 + token % 6 for token in row] for row in ROWS]  # 0 is padding to `generate`
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2, head_width=head_width, shortlist=6))
    ours.capture = captured
    for tree in (BRANCHING, CROOKED, *DYNAMIC.values()):
        for copy_tokens in (0, 2, 5):
            out = ours.generate(rows, max_new_tokens=24, mode=mode, tree=tree, copy_tokens=copy_tokens)
            assert out.token_ids == [plain_generate(model, row, 24) for row in rows]


@pytest.mark.parametrize("tree", [BRANCHING, *DYNAMIC.values()], ids=["constant", *DYNAMIC])
@pytest.mark.parametrize("copy_tokens", [0, 5])
@pytest.mark.parametrize("head_width", [0, 6])
def test_sampled_trees_draw_the_same_captured_or_not(tree, head_width, copy_tokens):
    model = tiny_model("llama", vocab_size=7).cuda()
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2, head_width=head_width, shortlist=6))
    found = []
    for captured in (True, False):
        ours.capture = captured
        options = {"max_new_tokens": 24, "temperature": 0.9, "seed": 3, "tree": tree, "copy_tokens": copy_tokens}
        found.append(ours.generate([[1, 2, 3], [4, 5]], **options).token_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_rows_are_bitwise_unchanged_by_the_adapter(dtype):
    from pardec.adapters.gated_lora import LoraGate
    from pardec.decoding.rows import RowForward
    from pardec.decoding.sampling import TokenLaw
    from pardec.decoding.step import Decoder

    base = load_base("tiny-python", device="cuda", dtype=dtype)
    seen = []
    for scale in (1.0, 50.0):
        adapter = make_adapter(base, 3, lora_rank=4)
        ours = SelfSpeculativeModel(base, None, adapter)
        masks = (adapter.mask_embeddings * scale).to("cuda", dtype)
        no_eos = torch.empty(0, dtype=torch.long, device="cuda")
        gate = LoraGate(base, adapter.lora) if scale > 1 else None
        decoder = Decoder(RowForward(ours.target, masks, gate), "fused", 3, TokenLaw(greedy=True), 8, no_eos)
        with torch.no_grad():
            state = decoder.prefill(ROWS)
            state.bonus = torch.tensor([1, 2, 3], device="cuda")
            state.drafts = torch.tensor([[4, 5, 6]] * 3, device="cuda")
            if gate is None:
                seen.append(decoder.step_logits(state)[:, :4])
            else:
                with gate.attached():
                    seen.append(decoder.step_logits(state)[:, :4])
    assert torch.equal(*seen)


def test_sampling_draws_on_the_device_and_is_repeatable():
    base = load_base("tiny-python", device="cuda", dtype=torch.bfloat16)
    ours = SelfSpeculativeModel(base, None, make_adapter(base, 3))
    options = {"max_new_tokens": 32, "temperature": 0.8, "top_k": 10, "seed": 0}
    assert ours.generate(ROWS, **options).token_ids == ours.generate(ROWS, **options).token_ids


def test_a_bf16_training_step_has_finite_gradients():
    base = load_base("tiny-python", device="cuda", dtype=torch.bfloat16)
    trainer = MaskTokenTrainer(base, Drafter(3))
    ids = torch.randint(0, 4096, (2, 64), device="cuda")
    anchors = torch.arange(8, device="cuda").expand(2, -1)
    with torch.autocast("cuda", torch.bfloat16):
        loss, count, _ = trainer(ids, torch.ones_like(ids, dtype=torch.bool), anchors)
    loss.backward()
    assert int(count) == 48
    assert bool(torch.isfinite(trainer.mask_embeddings.grad).all())
