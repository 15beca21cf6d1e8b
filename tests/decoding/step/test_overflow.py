"""Mask rows whose numbers overflow reach no real row: the tokens are plain's, and what stays in the cache is finite."""

import dataclasses
import math

import pytest
import torch
from covering import every_pair
from greedy_oracle import plain_generate
from recorded_steps import tape
from tiny_models import make_adapter, tiny_model

from pardec.adapters.adapter import AdapterError
from pardec.adapters.files import load_adapter, save_adapter
from pardec.adapters.gated_lora import LoraWeights
from pardec.decoding.engine import Engine
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.decoding.verify import sample_from
from pardec.draft_tree import DynamicTree
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel

K, V = 3, 64
ROWS = [[5, 6, 7, 8], [1, 2]]


def overflowing(base, scale: float, **parts):
    """An adapter of finite numbers whose mask rows are not."""
    adapter = make_adapter(base, K, lora_rank=4, **parts)
    tensors = {name: t * scale if "lora_B" in name else t for name, t in adapter.lora.tensors.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return dataclasses.replace(adapter, lora=dataclasses.replace(adapter.lora, tensors=tensors))


def tainted(monkeypatch) -> list[bool]:
    """Whether each forward of the steps and of prefill made numbers that are not finite, before they are mended."""
    from pardec.target import cache

    seen, mend = [], cache._make_finite

    def noted(states, rows):
        seen.append(not bool(states.isfinite().all()))
        mend(states, rows)

    monkeypatch.setattr(cache, "_make_finite", noted)
    return seen


@pytest.mark.parametrize(
    ("family", "dtype", "batch", "mode"),
    every_pair(
        ["llama", "llama-eager", "gpt2", "gemma3-mixed-windows"],
        [torch.float16, torch.float32, torch.bfloat16],
        [1, 2],
        ["fused", "two_pass"],
    ),
)
def test_tokens_are_those_of_plain_decoding(family, dtype, batch, mode, monkeypatch):
    scale = 300.0 if dtype == torch.float16 else 1e30
    base = tiny_model(family, dtype=dtype)
    ours = SelfSpeculativeModel(base, None, overflowing(base, scale, head_width=6))
    assert ours.engines.shared_limit is None  # a step of its own, before what is looked at here
    seen = tainted(monkeypatch)
    expected = ours.generate(ROWS[:batch], max_new_tokens=16, mode="plain").token_ids
    assert not any(seen)  # plain decoding has no such rows, only what stands behind a shorter prompt
    assert ours.generate(ROWS[:batch], max_new_tokens=16, mode=mode).token_ids == expected
    assert any(seen)  # what is tested did happen
    tree = DynamicTree((K,) * 7)  # drawn from what is no numbers
    assert ours.generate(ROWS[:batch], max_new_tokens=16, mode=mode, tree=tree).token_ids == expected
    out = ours.generate(ROWS[:batch], max_new_tokens=16, mode=mode, temperature=0.8, seed=0)
    assert all(0 <= token < V for row in out.token_ids for token in row)


@pytest.mark.parametrize("length", [14, 16, 31, 38, 45])
def test_whatever_the_number_of_keys_no_real_row_takes_in_a_mask_row(length):
    """On CPUs with AMX, products of bfloat16 of most lengths read the next row's first numbers, times 0."""
    base = tiny_model("llama-eager", dtype=torch.bfloat16)
    ours = SelfSpeculativeModel(base, None, overflowing(base, 1e30))
    prompt = torch.randint(5, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = ours.generate([prompt], max_new_tokens=6, mode="plain").token_ids
    for tree in (None, DynamicTree((K,) * 7)):
        assert ours.generate([prompt], max_new_tokens=6, mode="fused", tree=tree).token_ids == expected


@pytest.mark.parametrize("tokens_per_forward", [8192, 256])  # the longer prompt in one forward, or in chunks
def test_nor_does_one_of_prompts_so_unequal_that_each_is_prefilled_for_itself(tokens_per_forward, monkeypatch):
    monkeypatch.setattr("pardec.decoding.prefill._TOKENS_PER_FORWARD", tokens_per_forward)
    monkeypatch.setattr("pardec.decoding.prefill._MIN_CHUNK_TOKENS", 32)
    base = tiny_model("llama-eager", dtype=torch.bfloat16)
    ours = SelfSpeculativeModel(base, None, overflowing(base, 1e30))
    for length in range(70, 110, 5):
        generator = torch.Generator().manual_seed(length)
        prompts = [torch.randint(5, 60, (n,), generator=generator).tolist() for n in (length, 5, length, 4)]
        expected = ours.generate(prompts, max_new_tokens=6, mode="plain").token_ids
        assert ours.generate(prompts, max_new_tokens=6, mode="fused").token_ids == expected


@pytest.mark.parametrize("family", ["llama", "llama-eager", "gpt2"])
def test_real_rows_are_bitwise_those_beside_harmless_mask_rows(family):
    base = tiny_model(family, dtype=torch.float32)
    target, seen = TargetModel.wrap(base), []
    for scale in (1.0, float("inf"), float("nan")):
        masks = torch.full((K, target.embedding_dim), scale)
        decoder = Decoder(RowForward(target, masks), "fused", K, TokenLaw(True), 8, torch.empty(0, dtype=torch.long))
        state = decoder.prefill(ROWS)
        state.bonus, state.drafts = torch.tensor([1, 2]), torch.tensor([[4, 5, 6], [7, 8, 9]])
        with torch.no_grad():
            logits = decoder.step_logits(state)
        assert bool(logits[:, K + 1 :].isfinite().all()) is math.isfinite(scale)
        assert all(bool(buffer.isfinite().all()) for buffer in state.cache.buffers)
        seen.append(logits[:, : K + 1])
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([[False, True, True, False, True]] * 2)])
def test_only_the_rows_that_are_named_are_made_finite(rows):
    cache = SlotCache(1, 8, 2)
    cache.slots, cache.mask_rows = torch.arange(5).expand(2, -1), rows
    states = torch.full((2, 1, 5, 3), float("nan"))
    keys, _ = cache.update(states.clone(), states.clone(), 0)
    named = torch.zeros(2, 5, dtype=torch.bool)
    named[(slice(None), rows) if isinstance(rows, slice) else rows] = True
    assert torch.equal(keys[:, 0, :5, 0].isfinite(), named)
    assert bool((keys[:, 0, :5][named] == 0).all())


def test_a_law_of_nan_draws_a_token_of_the_vocabulary():
    assert 0 <= int(sample_from(torch.full((1, V), float("nan")))) < V


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_that_is_not_finite_is_refused(value):
    adapter = make_adapter(tiny_model("llama"), K, lora_rank=2)
    with pytest.raises(ValueError, match=r"lora_A\.weight: expected finite numbers, found NaN or infinity"):
        LoraWeights(adapter.lora.config, {name: tensor * value for name, tensor in adapter.lora.tensors.items()})


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1" + "0" * 400, "-1", "true", '"16"'])
def test_a_scaling_that_is_not_finite_is_refused_when_loaded(value, tmp_path):
    import hashlib
    import json

    save_adapter(make_adapter(tiny_model("llama"), K, lora_rank=2), tmp_path)
    file = tmp_path / "lora/adapter_config.json"
    text = json.dumps({**json.loads(file.read_text()), "lora_alpha": "HERE"}).replace('"HERE"', value)
    file.write_text(text)
    metadata = json.loads((tmp_path / "pardec.json").read_text())
    metadata["files"]["lora/adapter_config.json"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "pardec.json").write_text(json.dumps(metadata))
    with pytest.raises(AdapterError, match="expected lora_alpha as a finite number above 0") as error:
        load_adapter(tmp_path)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("part", ["masks", "lora", "head"])
def test_numbers_that_the_dtype_cannot_hold_are_refused(part):
    base = tiny_model("llama", dtype=torch.float16)
    adapter = make_adapter(base, K, lora_rank=2, head_width=6)
    huge = {
        "masks": {"mask_embeddings": adapter.mask_embeddings + 1e6},
        "lora": {"lora": LoraWeights(adapter.lora.config, {n: t + 1e6 for n, t in adapter.lora.tensors.items()})},
        "head": {"head": {name: tensor + 1e6 for name, tensor in adapter.head.items()}},
    }
    with pytest.raises(ValueError, match=r"expected numbers that are finite in torch\.float16"):
        SelfSpeculativeModel(base, None, dataclasses.replace(adapter, **huge[part]))


@pytest.mark.parametrize(
    ("family", "mode", "tokens_per_forward", "recorder", "value"),
    every_pair(
        ["llama", "llama-eager", "mistral-window"],
        ["plain", "two_pass", "fused"],
        [8192, 8],
        [None, tape],
        [float("inf"), float("nan")],
    ),
)
def test_what_stands_behind_a_shorter_prompt_reaches_it_in_no_way(
    family, mode, tokens_per_forward, recorder, value, monkeypatch
):
    """Also where a model makes no numbers of token 0, which no text has."""
    monkeypatch.setattr("pardec.decoding.prefill._TOKENS_PER_FORWARD", tokens_per_forward)
    monkeypatch.setattr("pardec.decoding.prefill._MIN_CHUNK_TOKENS", tokens_per_forward)
    monkeypatch.setattr("pardec.decoding.prompt_graphs.MAX_TOKENS", 1024 if tokens_per_forward > 1024 else 0)
    base = tiny_model(family, dtype=torch.float32)
    rows = [[5, 9, 3, 7, 2, 8, 11, 4, 9, 13, 21, 5, 6], [4, 6]]
    expected = [plain_generate(base, row, 6) for row in rows]
    with torch.no_grad():
        base.get_input_embeddings().weight[0] = value
    ours = SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))
    if recorder is not None:
        monkeypatch.setitem(Engine.__init__.__kwdefaults__, "recorder", recorder)
        ours.capture = True
    for given in (rows, rows[1:], rows[::-1]):
        tokens = [expected[rows.index(row)] for row in given]
        assert not any(0 in one for one in tokens)
        assert ours.generate(given, max_new_tokens=6, mode=mode).token_ids == tokens
