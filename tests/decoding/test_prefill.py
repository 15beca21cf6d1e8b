"""Prefill, whole and in chunks, against generate and plain forwards; prompts that serve several sequences run once."""

import dataclasses

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from tiny_models import make_adapter, tiny_model

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding import prefill
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.output import counts_of
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel

K = 3
V = 61
MODES = ["plain", "two_pass", "fused"]
FAMILIES = ["llama", "gemma3-mixed-windows", "mistral-window", "gpt2", "llama-eager"]


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of four tokens, whatever the number of prompts."""
    monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 4)
    monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)


class Widths:
    """Notes how many rows and columns the base embeds in each forward."""

    def __init__(self, model):
        self.shapes: list[tuple[int, int]] = []
        self.handle = model.get_input_embeddings().register_forward_hook(self.note)

    def note(self, module, args, output):
        self.shapes.append(tuple(args[0].shape))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *error):
        self.handle.remove()


def decoder_for(model, mode: str = "fused", *, new_tokens: int = 8, head_width: int = 0) -> Decoder:
    target, adapter = TargetModel.wrap(model), make_adapter(model, K, lora_rank=2, head_width=head_width)
    no_eos = torch.empty(0, dtype=torch.long)
    if mode == "plain":
        return Decoder(RowForward(target), mode, 0, TokenLaw(greedy=True), new_tokens, no_eos)
    masks, gate = adapter.mask_embeddings.to(target.dtype), LoraGate(model, adapter.lora)
    head = HeadDrafter.of(adapter, target)
    forward = RowForward(target, masks, gate, tap=head and head.tap)
    return Decoder(forward, mode, K, TokenLaw(greedy=True), new_tokens, no_eos, head=head)


# ---------------------------------------------------------------------- chunks


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = tiny_model(request.param)
    rows = prompts(V, (11, 3, 17, 6, 1))
    return model, rows, [plain_generate(model, row, 10) for row in rows]


@pytest.mark.parametrize("mode", MODES)
def test_prompts_run_in_chunks_give_generates_tokens(family, mode, short_chunks):
    model, rows, references = family
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    assert ours.generate(rows, max_new_tokens=10, mode=mode).token_ids == references


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_may_end_anywhere_in_a_chunk(mode, length, short_chunks):
    model = tiny_model("gpt2")
    row = prompts(V, (length,))[0]
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    with Widths(model) as shapes:
        found = ours.generate([row], max_new_tokens=6, mode=mode).token_ids
    assert found == [plain_generate(model, row, 6)]
    assert max(width for _, width in shapes) <= max(4, K + 1)


def test_a_chunk_is_as_long_as_the_number_of_prompts_allows(monkeypatch):
    monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 32)
    monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 5)
    model = tiny_model("llama")
    decoder = decoder_for(model, "plain")
    for num_prompts, chunk in ((1, 32), (2, 16), (4, 8), (8, 5)):
        with Widths(model) as shapes:
            decoder.prefill([[1, 2, 3] * 20] * num_prompts)
        *chunks, last = shapes
        assert {rows for rows, _ in shapes} == {num_prompts}
        assert [width for _, width in chunks[:-1]] == [chunk] * (len(chunks) - 1)
        assert sum(width for _, width in chunks) == 59
        assert last == (num_prompts, 1)  # the last token of every prompt, which may be of any length


def test_all_that_fits_runs_in_one_forward(monkeypatch):
    monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 20 + K)
    monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)
    model = tiny_model("llama")
    with Widths(model) as shapes:
        decoder_for(model).prefill([[5] * 20])
        assert shapes == [(1, 20)]  # the block of mask tokens has embeddings of its own
        decoder_for(model).prefill([[5] * 21])
        assert shapes[1:] == [(1, 20), (1, 1)]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_chunks_leave_the_same_keys_values_and_drafts_as_one_forward(family_name, monkeypatch):
    model = tiny_model(family_name)
    rows = prompts(V, (11, 3, 17))
    states = []
    for tokens in (8192, 4):
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", tokens)
        monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", tokens)
        states.append(decoder_for(model).prefill(rows))
    whole, chunked = states
    for name in ("lengths", "bonus", "drafts", "draft_length", "output", "num_new"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name)), name
    close = 1e-5 if family_name.endswith("eager") else 1e-9  # eager attention takes its softmax in float32
    for one, other in zip(whole.cache.layers, chunked.cache.layers, strict=True):
        for b, row in enumerate(rows):
            for name in ("keys", "values"):
                a, c = (getattr(layer, name)[b, :, : len(row) - 1] for layer in (one, other))
                torch.testing.assert_close(a, c, rtol=close, atol=close)


def test_the_first_block_behind_a_long_prompt_goes_through_the_lora(short_chunks):
    model = tiny_model("llama")
    decoder = decoder_for(model)
    row = prompts(V, (17,))[0]
    padded, lengths = torch.tensor([row]), torch.tensor([17])
    with torch.no_grad():
        logits = decoder._prefill.logits(padded, lengths, SlotCache(3, 64, 1))
        with decoder.attached(), decoder.forward.gate.open(slice(17, 17 + K), 1, 17 + K):
            embeds = torch.cat([model.get_input_embeddings()(padded), decoder.forward.mask_embeddings[None]], dim=1)
            expected = model(inputs_embeds=embeds, use_cache=False).logits[:, 16:]
        without = model(inputs_embeds=embeds, use_cache=False).logits[:, 16:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert ((logits - without)[0, 1:].abs().amax(dim=1) > 1e-3).all()  # and it makes a difference


def test_a_sampled_first_token_does_not_depend_on_chunks(short_chunks, monkeypatch):
    model = tiny_model("llama")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    rows = prompts(V, (11, 17))
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 12, "seed": 5}
    chunked = ours.generate(rows, **options).token_ids
    monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 256)
    assert ours.generate(rows, **options).token_ids == chunked


# ---------------------------------------------------------------------- groups of similar length


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([7], [[0]]),
        ([5, 5, 5], [[0, 1, 2]]),
        ([9, 6, 8], [[0, 2, 1]]),  # 1 + 3 tokens of padding, as many as are allowed
        ([9, 5, 8], [[0, 2], [1]]),
        ([1, 20, 2, 18, 19, 1], [[1, 4, 3], [2, 0, 5]]),
    ],
    ids=str,
)
def test_prompts_are_grouped_where_padding_would_cost_more_than_a_forward(lengths, groups, monkeypatch):
    monkeypatch.setattr(prefill, "_PADDING_OF_A_GROUP", 4)
    assert prefill.prompt_groups(lengths) == groups


@pytest.fixture
def small_groups(monkeypatch):
    """Prompts of several groups: hardly any padding is allowed."""
    monkeypatch.setattr(prefill, "_PADDING_OF_A_GROUP", 2)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_prompts_run_in_groups_give_generates_tokens(family, mode, repeats, small_groups):
    model, rows, references = family
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    ours.generate(rows[:2], max_new_tokens=2, mode=mode)  # whatever is observed once has been observed
    with Widths(model) as shapes:
        found = ours.generate(rows, max_new_tokens=10, mode=mode, num_return_sequences=repeats).token_ids
    assert found == [reference for reference in references for _ in range(repeats)]
    assert shapes[:4] == [(1, 17), (1, 11), (1, 6), (2, 3)]


def test_long_prompts_among_groups_are_run_in_chunks(family, small_groups, monkeypatch):
    monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 8)
    monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 8)
    model, rows, references = family
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    assert ours.generate(rows, max_new_tokens=10).token_ids == references


def test_prompts_of_a_base_whose_weights_are_brought_in_run_in_one_forward(small_groups, monkeypatch):
    model = tiny_model("llama")
    decoder = decoder_for(model)
    for is_offloaded, num_forwards in ((False, 3), (True, 1)):
        monkeypatch.setattr("pardec.decoding.prefill.is_offloaded", lambda base, found=is_offloaded: found)
        with Widths(model) as shapes:
            decoder.prefill(prompts(V, (11, 3, 17)))
        assert len(shapes) == num_forwards


@pytest.mark.parametrize("family_name", FAMILIES)
def test_groups_leave_the_same_keys_values_and_drafts_as_one_forward(family_name, monkeypatch):
    model = tiny_model(family_name)
    rows = prompts(V, (11, 3, 17, 2))
    states = []
    for padding in (1000, 0):
        monkeypatch.setattr(prefill, "_PADDING_OF_A_GROUP", padding)
        states.append(decoder_for(model).prefill(rows))
    together, apart = states
    for name in ("lengths", "bonus", "drafts", "draft_length", "output", "num_new"):
        assert torch.equal(getattr(together, name), getattr(apart, name)), name
    close = 1e-5 if family_name.endswith("eager") else 1e-9  # eager attention takes its softmax in float32
    for one, other in zip(together.cache.layers, apart.cache.layers, strict=True):
        for b, row in enumerate(rows):
            for name in ("keys", "values"):
                a, c = (getattr(layer, name)[b, :, : len(row)] for layer in (one, other))
                torch.testing.assert_close(a, c, rtol=close, atol=close)


# ---------------------------------------------------------------------- several sequences for one prompt


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_sequences_that_continue_one_prompt_share_its_prefill(mode, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 4)
        monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)
    model = tiny_model("gemma3-mixed-windows")
    rows = prompts(V, (11, 3))
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    ours.generate(rows, max_new_tokens=2)  # whatever is observed once has been observed
    with Widths(model) as shapes:
        out = ours.generate(rows, max_new_tokens=9, num_return_sequences=3, mode=mode)
    assert out.token_ids == [plain_generate(model, row, 9) for row in rows for _ in range(3)]
    assert out.prompt_lengths.tolist() == [11] * 3 + [3] * 3
    prompt_forwards = [width for num_rows, width in shapes if num_rows == 2]
    assert sum(prompt_forwards) == 11  # columns 0..9 and the last token, or all at once
    assert all(num_rows == 6 for num_rows, _ in shapes[len(prompt_forwards) :])


def test_repeated_sequences_draw_for_themselves():
    model = tiny_model("llama")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    out = ours.generate(prompts(V, (11, 3)), max_new_tokens=8, temperature=1.0, num_return_sequences=8, seed=0)
    for group in (out.token_ids[:8], out.token_ids[8:]):
        assert len({tuple(tokens) for tokens in group}) > 1


@pytest.mark.parametrize("mode", MODES)
def test_unused_rows_of_a_batch_are_done_from_the_beginning_and_disturb_nobody(mode):
    model = tiny_model("llama")
    rows = prompts(V, (11, 3, 6))
    decoder = decoder_for(model, mode)
    with decoder.attached():
        state = decoder.prefill(rows, num_unused=2, capacity=13)
        assert state.done.tolist() == [False] * 3 + [True] * 2
        assert state.output.shape[1] >= 13
        while not state.done.all():
            decoder.step(state)
    assert state.output[:3, :8].tolist() == [plain_generate(model, row, 8) for row in rows]
    assert state.num_new.tolist() == [8] * 3 + [0] * 2
    assert [one.accepted for one in counts_of(state, mode, 5)[3:]] == [[], []]


# ---------------------------------------------------------------------- no wait for the device


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("lengths", [(9,), (9, 3)], ids=["one", "two"])
@pytest.mark.parametrize(("mode", "head_width"), [("plain", 0), ("two_pass", 0), ("fused", 0), ("fused", 6)])
def test_prefill_asks_for_no_value(mode, head_width, lengths, chunked, monkeypatch):
    """On the meta device, where tensors have none: whatever asks for one raises."""
    if chunked:
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 4)
        monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)
    model = tiny_model("gemma3-mixed-windows")
    here, adapter = decoder_for(model, mode, head_width=head_width), make_adapter(model, K, lora_rank=2)
    headed = make_adapter(model, K, head_width=6)
    model.to("meta")
    target = TargetModel.wrap(model)
    forward, head = RowForward(target), None
    if mode != "plain":
        head = HeadDrafter.of(headed, target) if head_width else None
        masks = here.forward.mask_embeddings.to("meta")
        forward = RowForward(target, masks, LoraGate(model, adapter.lora), tap=head and head.tap)
    decoder = dataclasses.replace(here, forward=forward, head=head, eos_token_ids=here.eos_token_ids.to("meta"))
    for options in ({}, {"repeats": 3, "num_unused": 2}):
        state = decoder.prefill(prompts(V, lengths), **options)
        assert state.drafts.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        torch.arange(3, device="meta").unique()  # what this rests on


def test_a_cache_that_held_other_prompts_serves_again():
    model = tiny_model("gemma3-mixed-windows")
    decoder = decoder_for(model)
    cache = SlotCache(3, 96, 2)
    for rows in (prompts(V, (17, 9)), prompts(V, (3, 11)), prompts(V, (1, 2))):
        with decoder.attached():
            state = decoder.prefill(rows, cache=cache)
            while not state.done.all():
                decoder.step(state)
        assert state.output[:, :8].tolist() == [plain_generate(model, row, 8) for row in rows]
