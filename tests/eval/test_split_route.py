"""The route whose keys are split into parts: its numbers are those of grouped attention, its parts no copies."""

import pytest
import torch
from attention_samples import attention_inputs
from greedy_oracle import plain_generate, prompts
from timing import shapes, split_route
from timing.split_route import finite_mask, num_parts, split_attention
from timing.steps import SPLIT, Subject, Variant
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pardec.decoding.engine import Engine
from pardec.target.attention import grouped_attention
from pardec.target.forward import TargetModel


@pytest.fixture
def multiprocessors(monkeypatch):
    def set_to(number):
        monkeypatch.setattr(split_route, "num_multiprocessors", lambda device: number)

    set_to(132)
    return set_to


SIZES = [(1, 2, 2, 9, 256, 16), (1, 3, 3, 25, 320, 24), (3, 2, 4, 4, 512, 64), (1, 8, 4, 1, 1024, 128)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of_all_heads", [True, False])
def test_it_is_grouped_attention(size, of_all_heads, multiprocessors):
    torch.manual_seed(0)
    query, key, value, mask = attention_inputs(*size)
    assert num_parts(query, key, value) >= 4
    expected, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    finite = finite_mask(mask, key.shape[1] if of_all_heads else None)
    found, _ = split_attention(torch.nn.Module(), query, key, value, finite, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_the_truth_as_grouped_attention(dtype, multiprocessors):
    torch.manual_seed(0)
    query, key, value, mask = attention_inputs(2, 2, 4, 9, 512, 64, dtype)
    truth, _ = grouped_attention(torch.nn.Module(), query.double(), key.double(), value.double(), mask.double())
    grouped, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    split, _ = split_attention(torch.nn.Module(), query, key, value, finite_mask(mask, 2))
    assert split.dtype == dtype
    assert (split - truth).abs().max() < 2 * (grouped - truth).abs().max()


@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_parts_in_which_a_row_sees_nothing_have_no_weight_whatever_the_scores(score, multiprocessors):
    query, key, value, mask = attention_inputs(1, 2, 1, 3, 256, 16)
    query[..., 0], key[..., 0] = score, 1.0
    key[:, :, 128:, 0] = -1.0  # what is hidden scores otherwise
    finite = finite_mask(mask, None)
    found, _ = split_attention(torch.nn.Module(), query, key, value, finite, scaling=1.0)
    value[:, :, 128:] = 1e30
    again, _ = split_attention(torch.nn.Module(), query, key, value, finite, scaling=1.0)
    assert torch.equal(found, again)
    assert torch.equal(found[:, 0], value[:, :, 65])


@pytest.mark.parametrize(
    ("dtype", "head_size", "kind"),
    [
        (torch.float64, 16, "additive"),
        (torch.float32, 12, "additive"),
        (torch.float32, 16, "none"),
        (torch.float32, 16, "bool"),  # of a call by someone else while a step runs
    ],
)
def test_what_its_kernels_do_not_serve_is_left_to_grouped_attention(dtype, head_size, kind, multiprocessors):
    query, key, value, mask = attention_inputs(1, 2, 1, 3, 256, head_size, dtype)
    mask = {"additive": finite_mask(mask, None), "none": None, "bool": mask == 0}[kind]
    layer = torch.nn.Module()
    layer.is_causal = False
    expected, _ = grouped_attention(layer, query, key, value, mask)
    assert torch.equal(split_attention(layer, query, key, value, mask)[0], expected)


@pytest.mark.parametrize(
    ("size", "number", "expected"),
    [
        ((1, 8, 4, 1, 1024, 128), 132, 16),  # parts of 64 slots
        ((1, 8, 4, 1, 4096, 128), 132, 16),  # 128 blocks
        ((1, 8, 4, 25, 4096, 128), 132, 8),  # more rows than a block has
        ((8, 8, 4, 1, 4096, 128), 132, 2),
        ((16, 8, 4, 1, 4096, 128), 132, 1),  # sequences fill the device
        ((1, 8, 4, 1, 4608, 128), 132, 16),
        ((1, 8, 4, 1, 1312, 128), 132, 2),  # parts begin at multiples of 16
        ((1, 8, 4, 1, 64, 128), 132, 1),
        ((1, 8, 4, 1, 4096, 128), 2, 1),
    ],
)
def test_parts_are_as_many_as_the_device_has_use_for(size, number, expected, multiprocessors):
    multiprocessors(number)
    B, H, G, R, S, D = size
    query, key = torch.empty(B, H * G, R, D, device="meta"), torch.empty(B, H, S, D, device="meta")
    assert num_parts(query, key, key) == 1  # a device whose kernels give no sums
    with FakeTensorMode():
        query, key = torch.empty(B, H * G, R, D), torch.empty(B, H, S, D)
        assert num_parts(query, key, key) == expected


class _Calls(TorchDispatchMode):
    """Collects what runs, with its arguments and its results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def of(self, name):
        return [call for call in self.calls if name in str(call[0])]


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_neither_keys_nor_values_nor_masks_are_copied_in_a_layer(num_sequences, multiprocessors):
    query, key, value, mask = attention_inputs(num_sequences, 2, 2, 4, 512, 16)
    finite = finite_mask(mask, 2)
    with _Calls() as seen:
        split_attention(torch.nn.Module(), query, key, value, finite)
    ((_, args, kwargs, _),) = seen.of("flash_attention_for_cpu")
    for given, original in ((args[1], key), (args[2], value), (kwargs["attn_mask"], finite)):
        assert given.untyped_storage().data_ptr() == original.untyped_storage().data_ptr()
    assert args[1].shape[0] == num_parts(query, key, value) > 1
    results = [result for _, _, _, result in seen.calls if isinstance(result, torch.Tensor)]
    copies = [one for one in results if one.untyped_storage().nbytes() >= key.nbytes and not one._is_view()]
    assert not copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_on_cuda_the_kernel_takes_aligned_masks_and_padded_sums_and_the_host_reads_nothing(
    dtype, num_sequences, multiprocessors
):
    B = num_sequences
    with FakeTensorMode(), torch.device("cuda"):
        cache = torch.empty(2, B, 8, 2048, 128, dtype=dtype)
        query, key, value = torch.empty(B, 25, 32, 128, dtype=dtype).transpose(1, 2), *cache.narrow(3, 0, 1024).unbind()
        mask = torch.empty(B, 1, 100, 1024, dtype=dtype)
        finite = finite_mask(mask, 8)
        with _Calls() as seen:
            out, _ = split_attention(torch.nn.Module(), query, key, value, finite)
        n = num_parts(query, key, value)
    ((_, args, _, result),) = seen.of("efficient_attention")
    rows, keys, _, bias = args[:4]
    assert n > 1
    assert rows.shape == (n, 8 * B, 100, 128)
    assert keys.shape == (n, 8 * B, 1024 // n, 128)
    assert bias.shape == (n, 8 * B, 100, 1024 // n)
    assert bias.stride(3) == 1
    assert all(stride % 16 == 0 for stride in bias.stride()[:3])
    assert result[1].shape == (n, 8 * B, 128)
    assert out.shape == (B, 25, 32, 128)
    assert out.dtype == dtype
    assert out.is_contiguous() or dtype == torch.float32  # the conversion leaves nothing to copy
    assert len(seen.of("clone")) == 1  # of the rows, whose heads lie apart


@pytest.mark.parametrize("family", ["llama", "qwen3-mixed-windows"])
@pytest.mark.parametrize(("num_drafted", "lengths"), [(0, [120]), (2, [120]), (2, [30, 115, 60])])
def test_generations_are_those_of_generate(family, num_drafted, lengths, monkeypatch, multiprocessors):
    monkeypatch.setattr(split_route, "LEAST_SLOTS", 16)
    base = tiny_model(family, dtype=torch.float32)
    subject = Subject(TargetModel.wrap(base), shapes.random_mask_embeddings(base, 2, 0), None)
    decoder = subject.engine(num_drafted, Variant(compile=False, lora=False, attention=SPLIT), 40).decoder
    # a recorder that runs the step again stands for the graph
    engine = Engine(decoder, 512, captured=True, recorder=lambda run, generator, site: run)
    found = [[] for _ in lengths]
    texts = prompts(61, lengths)
    with _Calls() as seen:
        for step in engine.run(texts):
            for tokens, new in zip(found, step.tokens, strict=True):
                tokens += new
    parts = {args[0].shape[0] for _, args, _, _ in seen.of("flash_attention_for_cpu") if args[0].shape[2] < 30}
    assert max(parts) >= 4
    assert found == [plain_generate(base, text, 40) for text in texts]
    assert base.config._attn_implementation == "sdpa"
