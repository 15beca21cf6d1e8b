"""Routes of attention that are measured beside the engine's own, on a CUDA device; run with `pytest -m gpu`."""

import pytest
import torch
from attention_samples import attention_inputs
from greedy_oracle import plain_generate, prompts
from timing import shapes
from timing.split_route import finite_mask, num_parts, split_attention
from timing.steps import FLEX, SPLIT, Subject, Variant
from tiny_models import tiny_model

from pardec.target.attention import grouped_attention
from pardec.target.forward import TargetModel

pytestmark = pytest.mark.gpu
LAYER = torch.nn.Module()
SIZES = [(1, 8, 4, 1, 1024, 128), (1, 8, 4, 25, 4096, 128), (1, 3, 3, 16, 768, 64), (3, 2, 4, 9, 512, 64)]


@pytest.fixture(autouse=True)
def exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_split_keys_are_as_near_to_the_truth_as_grouped_attention(size, dtype):
    torch.manual_seed(0)
    query, key, value, mask = attention_inputs(*size, dtype, "cuda")
    assert num_parts(query, key, value) > 1
    truth, _ = grouped_attention(LAYER, query.double(), key.double(), value.double(), mask.double())
    grouped, _ = grouped_attention(LAYER, query, key, value, mask)
    for heads in (None, size[1]):
        split, _ = split_attention(LAYER, query, key, value, finite_mask(mask, heads))
        assert (split - truth).abs().max() < 2 * (grouped - truth).abs().max() + 1e-6


def test_split_keys_are_captured_and_read_anew_at_every_replay():
    query, key, value, mask = attention_inputs(1, 8, 4, 9, 1024, 128, torch.bfloat16, "cuda")
    mask = finite_mask(mask, None)
    split_attention(LAYER, query, key, value, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = split_attention(LAYER, query, key, value, mask)
    for one in (query, key, value):
        one.normal_()
    graph.replay()
    assert torch.equal(found, split_attention(LAYER, query, key, value, mask)[0])


@pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores")
@pytest.mark.parametrize("attention", [SPLIT, FLEX])
@pytest.mark.parametrize(("num_drafted", "lengths"), [(0, [400]), (2, [400]), (3, [30, 250, 60])])
def test_captured_generations_are_those_of_generate(attention, num_drafted, lengths):
    # 10, 90 and 160 grouped rows: FlexAttention has one kernel for fewer than 128 of them, and another
    sizes = {"hidden_size": 40, "head_dim": 16, "num_attention_heads": 20, "max_position_embeddings": 512}
    base = tiny_model("llama", dtype=torch.float32, **sizes).cuda()
    subject = Subject(TargetModel.wrap(base), shapes.random_mask_embeddings(base, 3, 0), None)
    engine = subject.engine(num_drafted, Variant(compile=False, lora=False, attention=attention), 40)
    texts, found = prompts(61, lengths), [[] for _ in lengths]
    for step in engine.run(texts):
        for tokens, new in zip(found, step.tokens, strict=True):
            tokens += new
    assert found == [plain_generate(base, text, 40) for text in texts]
