"""Keys in parts on a CUDA device, where steps take them; run with `pytest -m gpu`."""

import pytest
import torch
from attention_samples import attention_inputs, for_parts
from greedy_oracle import plain_generate, prompts
from tiny_models import make_adapter, tiny_model

from pardec.model import SelfSpeculativeModel
from pardec.target import attention
from pardec.target.attention import grouped_attention
from pardec.target.forward import TargetModel
from pardec.target.split_keys import num_parts
from pardec.target.survey import survey

pytestmark = pytest.mark.gpu
LAYER = torch.nn.Module()
SIZES = [(1, 8, 4, 1, 1024, 128), (1, 8, 4, 25, 4096, 128), (1, 3, 3, 16, 768, 64), (3, 2, 4, 9, 512, 64)]


@pytest.fixture(autouse=True)
def exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_keys_in_parts_are_as_near_to_the_truth_as_whole_keys(size, dtype):
    torch.manual_seed(0)
    query, key, value, mask = attention_inputs(*size, dtype, "cuda")
    assert num_parts(query.reshape(size[0], size[1], -1, size[5]), key, value) > 1
    truth, _ = grouped_attention(LAYER, query.double(), key.double(), value.double(), mask.double())
    whole, _ = grouped_attention(LAYER, query, key, value, mask, in_parts=False)
    split, _ = grouped_attention(LAYER, query, key, value, for_parts(mask, size[1]))
    # outputs of parts are rounded before they are weighed, and their sum once more, each by half of this at most
    rounding = torch.finfo(dtype).eps * float(truth.abs().max())
    assert (split - truth).abs().max() < 2 * (whole - truth).abs().max() + max(rounding, 1e-6)


def test_keys_in_parts_are_captured_and_read_anew_at_every_replay():
    query, key, value, mask = attention_inputs(1, 8, 4, 9, 1024, 128, torch.bfloat16, "cuda")
    mask = for_parts(mask, 8)
    grouped_attention(LAYER, query, key, value, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = grouped_attention(LAYER, query, key, value, mask)
    for one in (query, key, value):
        one.normal_()
    graph.replay()
    assert torch.equal(found, grouped_attention(LAYER, query, key, value, mask)[0])


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
@pytest.mark.parametrize("lengths", [[200], [30, 180, 60]])
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2"])
def test_captured_generations_are_those_of_generate(family, lengths, mode, monkeypatch):
    base = tiny_model(family, dtype=torch.float32).cuda()
    assert survey(TargetModel.wrap(base)).query_group is not None
    parts, split = [], attention.attention_by_parts
    monkeypatch.setattr(
        attention, "attention_by_parts", lambda *args, n, **rest: parts.append(n) or split(*args, n=n, **rest)
    )
    ours = SelfSpeculativeModel(base, None, make_adapter(base, 3, lora_rank=2))
    texts = prompts(61, lengths)
    found = ours.generate(texts, max_new_tokens=40, mode=mode).token_ids
    assert max(parts) >= 4
    assert found == [plain_generate(base, text, 40) for text in texts]
