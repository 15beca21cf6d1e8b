"""Keys in parts: the numbers are those of whole keys, parts are no copies, and steps have them where a GPU is idle."""

import pytest
import torch
from attention_samples import attention_inputs, for_parts
from greedy_oracle import plain_generate, prompts
from recorded_steps import V, decoder_for, tape
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pardec.decoding.engine import Engine
from pardec.decoding.sampling import TokenLaw
from pardec.target import split_keys
from pardec.target.attention import group_rows, grouped_attention, split_heads
from pardec.target.forward import TargetModel
from pardec.target.split_keys import num_parts, worth_splitting
from pardec.target.survey import survey

LAYER = torch.nn.Module()
LAYER.is_causal = False


@pytest.fixture
def multiprocessors(monkeypatch):
    """As if this machine's CPU had so many."""

    def set_to(number):
        monkeypatch.setattr(split_keys, "num_multiprocessors", lambda device: number)

    set_to(132)
    return set_to


def grouped(query, key):
    """The rows that `num_parts` sees."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])


SIZES = [
    (1, 2, 2, 9, 256, 16),
    (1, 3, 3, 25, 320, 24),
    (3, 2, 4, 4, 512, 64),
    (1, 8, 4, 1, 1024, 128),
    (2, 1, 4, 2, 256, 8),
]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_attention_over_whole_keys(size, multiprocessors):
    torch.manual_seed(0)
    query, key, value, mask = attention_inputs(*size)
    assert num_parts(grouped(query, key), key, value) >= 4
    expected, _ = grouped_attention(LAYER, query, key, value, mask, scaling=0.3, in_parts=False)
    with _Calls() as seen:
        found, _ = grouped_attention(LAYER, query, key, value, for_parts(mask, key.shape[1]), scaling=0.3)
    assert seen.of("flash_attention_for_cpu")[0][1][0].shape[0] >= 4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_the_truth_as_whole_keys(dtype, multiprocessors):
    torch.manual_seed(0)
    query, key, value, mask = attention_inputs(2, 2, 4, 9, 512, 64, dtype)
    truth, _ = grouped_attention(LAYER, query.double(), key.double(), value.double(), mask.double())
    whole, _ = grouped_attention(LAYER, query, key, value, mask, in_parts=False)
    split, _ = grouped_attention(LAYER, query, key, value, for_parts(mask, 2))
    assert split.dtype == dtype
    assert not torch.equal(split, whole)
    assert (split - truth).abs().max() < 2 * (whole - truth).abs().max()


@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_parts_in_which_a_row_sees_nothing_have_no_weight_whatever_the_scores(score, multiprocessors):
    query, key, value, mask = attention_inputs(1, 2, 1, 3, 256, 16)
    query[..., 0], key[..., 0] = score, 1.0
    key[:, :, 128:, 0] = -1.0  # what is hidden scores otherwise
    finite = for_parts(mask, 2)
    found, _ = grouped_attention(LAYER, query, key, value, finite, scaling=1.0)
    value[:, :, 128:] = 1e30
    again, _ = grouped_attention(LAYER, query, key, value, finite, scaling=1.0)
    assert torch.equal(found, again)
    assert torch.equal(found[:, 0], value[:, :, 65])


@pytest.mark.parametrize(
    ("dtype", "head_size", "kind"),
    [
        (torch.float64, 16, "made for parts"),
        (torch.float32, 12, "made for parts"),
        (torch.float32, 16, "of one head"),  # -inf would make NaN of a part
        (torch.float32, 16, "none"),
        (torch.float32, 16, "bool"),  # of a call by someone else while a step runs
    ],
)
def test_what_is_not_for_its_kernels_keeps_whole_keys(dtype, head_size, kind, multiprocessors):
    query, key, value, mask = attention_inputs(1, 2, 1, 3, 256, head_size, dtype)
    mask = {"made for parts": for_parts(mask, 2), "of one head": mask, "none": None, "bool": mask == 0}[kind]
    expected, _ = grouped_attention(LAYER, query, key, value, mask, in_parts=False)
    assert torch.isfinite(expected).all()
    assert torch.equal(grouped_attention(LAYER, query, key, value, mask)[0], expected)


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
    query, key = torch.empty(B, H, G * R, D, device="meta"), torch.empty(B, H, S, D, device="meta")
    assert num_parts(query, key, key) == expected


def test_a_cpu_keeps_whole_keys_and_masks_as_they_were_and_paper_has_the_parts_of_a_gpu():
    for device, expected in (("cpu", 1), ("meta", 16)):
        query, key = torch.empty(1, 8, 4, 128, device=device), torch.empty(1, 8, 1024, 128, device=device)
        assert num_parts(query, key, key) == expected
        assert worth_splitting(query.device) == (expected > 1)
    base = tiny_model("llama")
    assert split_heads(base, torch.device("cpu")) is None
    assert split_heads(base, torch.device("meta")) == 2
    assert split_heads(tiny_model("gpt2"), torch.device("meta")) == 4  # which names query heads only


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_masks_for_parts_are_finite_and_have_all_heads(num_sequences):
    visible = torch.rand(num_sequences, 1, 3, 8) < 0.5
    for dtype, hidden in ((torch.float32, -1e30), (torch.float16, -65504.0)):
        mask = group_rows(visible, 2, dtype, 4)
        assert mask.dtype == dtype
        expected = torch.where(visible, 0.0, hidden).to(dtype).repeat(1, 4, 2, 1)
        assert torch.equal(mask, expected)
    assert mask.untyped_storage().nbytes() == (mask.nbytes // 4 if num_sequences == 1 else mask.nbytes)
    kinds = group_rows({"full_attention": visible}, 2, torch.float32, 4)
    assert kinds["full_attention"].shape == (num_sequences, 4, 6, 8)


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
    finite = for_parts(mask, 2)
    with _Calls() as seen:
        grouped_attention(LAYER, query, key, value, finite)
    ((_, args, kwargs, _),) = seen.of("flash_attention_for_cpu")
    for given, original in ((args[1], key), (args[2], value), (kwargs["attn_mask"], finite)):
        assert given.untyped_storage().data_ptr() == original.untyped_storage().data_ptr()
    assert args[1].shape[0] == num_parts(grouped(query, key), key, value) > 1
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
        finite = for_parts(torch.empty(B, 1, 100, 1024, dtype=dtype), 8)
        with _Calls() as seen:
            out, _ = grouped_attention(LAYER, query, key, value, finite)
        n = num_parts(grouped(query, key), key, value)
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
    assert not seen.of("_local_scalar_dense")
    assert len(seen.of("clone")) == 1  # of the rows, whose heads lie apart


@pytest.mark.parametrize("family", ["llama", "qwen3-mixed-windows", "gpt2"])
@pytest.mark.parametrize(("mode", "lengths"), [("plain", [90]), ("fused", [90]), ("two_pass", [30, 85, 60])])
def test_recorded_generations_are_those_of_generate(family, mode, lengths, monkeypatch, multiprocessors):
    monkeypatch.setattr(split_keys, "LEAST_SLOTS", 16)
    base = tiny_model(family, dtype=torch.float32)
    engine = Engine(decoder_for(base, mode, TokenLaw(True), new_tokens=30), 512, captured=True, recorder=tape)
    found, texts = [[] for _ in lengths], prompts(V, lengths)
    with _Calls() as seen:
        for step in engine.run(texts):
            for tokens, new in zip(found, step.tokens, strict=True):
                tokens += new
    parts = {args[0].shape[0] for _, args, _, _ in seen.of("flash_attention_for_cpu")}
    assert max(parts) >= 4
    assert found == [plain_generate(base, text, 30) for text in texts]
    assert base.config._attn_implementation == "sdpa"


def test_the_route_is_looked_at_with_its_parts(monkeypatch, multiprocessors):
    """A device may lack the kernel that gives sums: then steps keep the model's own attention."""
    target = TargetModel.wrap(tiny_model("llama", dtype=torch.float32))
    bytes_per_slot = survey(target).bytes_per_slot
    assert survey(target).query_group == 2

    def raises(*args, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("pardec.target.attention.attention_by_parts", raises)
    assert survey(target).query_group is None
    multiprocessors(1)
    assert survey(target).query_group == 2
    assert survey(target).bytes_per_slot == bytes_per_slot
