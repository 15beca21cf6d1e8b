"""Decoding with a sampler head: tokens against generate, drafts against loops over plain forwards."""

import dataclasses

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from tiny_models import FAMILIES, make_adapter, tiny_model

import pardec
from pardec.adapters.adapter import AdapterError
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.decoding import drafting, prefill
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.layout import full_blocks
from pardec.model import SelfSpeculativeModel
from pardec.target import forward as forward_module
from pardec.target.compiling import compiled
from pardec.target.forward import TargetModel
from pardec.target.hidden import HiddenTap
from pardec.target.survey import survey

V, K, SHORTLIST = 61, 3, 8


def headed(model, *, shortlist: int = SHORTLIST, **options) -> SelfSpeculativeModel:
    adapter = make_adapter(model, K, lora_rank=2, head_width=6, shortlist=shortlist, **options)
    return SelfSpeculativeModel(model, None, adapter)


def decoder_for(model, mode: str, *, new_tokens: int = 12, block_lengths=None, routed=True, **options) -> Decoder:
    ours, target = headed(model), TargetModel.wrap(model)
    masks, gate = ours.adapter.mask_embeddings.to(target.dtype), LoraGate(model, ours.adapter.lora)
    group = survey(target).query_group if routed else None
    head, no_eos = HeadDrafter.of(ours.adapter, target), torch.empty(0, dtype=torch.long)
    forward = RowForward(target, masks, gate, query_group=group, tap=head.tap, **options)
    return Decoder(forward, mode, K, TokenLaw(True), new_tokens, no_eos, block_lengths, head)


# ---------------------------------------------------------------------- drafts


def oracle(decoder: Decoder, context: list[int], previous: int, num_drafts: int) -> list[int]:
    """Drafts behind a context: one plain forward of it and a block of mask tokens, then a loop over the block."""
    base, head, seen = decoder.target.base, decoder.head.head, []
    handle = base.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeds = torch.cat([decoder.target.embed(torch.tensor([context])), decoder.forward.mask_embeddings[None]], dim=1)
    n = len(context)
    with torch.no_grad(), decoder.forward.gate.attached(), decoder.forward.gate.open(slice(n, n + K), 1, n + K):
        logits = base(inputs_embeds=embeds, use_cache=False).logits[0, n:]
    handle.remove()
    drafts = []
    for j in range(num_drafts):
        vector = head(seen[0][0, n + j], decoder.target.embed(torch.tensor(previous)))
        scores = {}
        for token in logits[j].argsort(descending=True)[:SHORTLIST].tolist():
            scores[token] = float(logits[j, token] + base.get_output_embeddings().weight[token] @ vector)
        previous = max(scores, key=scores.__getitem__)
        drafts.append(previous)
    return drafts


def assert_drafts(decoder: Decoder, state, rows: list[list[int]], committed: list[int] | None = None) -> None:
    """The drafts of every live row are the oracle's; `committed` = new tokens before the drafting forward's block."""
    for b, row in enumerate(rows):
        if state.done[b]:
            continue
        output = state.output[b].tolist()
        n = int(state.num_new[b]) - 1 if committed is None else committed[b]
        length = int(state.draft_length[b])
        assert state.drafts[b, :length].tolist() == oracle(decoder, row + output[:n], output[n], length)


@pytest.mark.parametrize("block_lengths", [None, (3, 1, 0, 2)], ids=["full", "pruned"])
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2", "opt", "granite"])
def test_drafts_of_prefill_and_steps_are_those_of_a_loop_over_plain_forwards(family, block_lengths):
    model = tiny_model(family)
    rows = prompts(V, (11, 3, 6))
    decoder = decoder_for(model, "fused", block_lengths=block_lengths)
    with decoder.attached():
        state = decoder.prefill(rows)
        assert_drafts(decoder, state, rows)
        truth = [plain_generate(model, row, 12) for row in rows]
        for step in range(3):
            # so that as many are accepted as there are, none, or some
            state.drafts = torch.tensor(
                [(row[int(n) :] + [0] * K)[:K] for row, n in zip(truth, state.num_new, strict=True)]
            )
            state.drafts[step, :] = (state.drafts[step] + 1) % V
            state.drafts[step - 1, 1:] = (state.drafts[step - 1, 1:] + 1) % V
            decoder.step(state)
            assert_drafts(decoder, state, rows)
    assert {accepted for rounds in state.rounds() for accepted, _ in rounds} >= {0, 1}


def test_the_head_makes_a_difference_to_drafts():
    model = tiny_model("llama")
    decoder = decoder_for(model, "fused")
    state = decoder.prefill(prompts(V))
    decoder.head = None
    assert (state.drafts != decoder.prefill(prompts(V)).drafts).any(dim=1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_drafts_of_two_pass_follow_its_exact_token(family):
    model = tiny_model(family)
    rows = prompts(V, (11, 3, 6))
    decoder = decoder_for(model, "two_pass")
    with decoder.attached():
        state = decoder.prefill(rows)
        for _ in range(3):
            before = state.num_new.tolist()
            decoder.step(state)
            assert_drafts(decoder, state, rows, committed=before)


@pytest.mark.parametrize("takes_rows_of_each", [True, False], ids=["newer", "older"])
@pytest.mark.parametrize("run", ["at once", "in groups", "in chunks"])
def test_prefill_drafts_the_same_however_prompts_are_run_for_several_sequences_and_with_older_transformers(
    run, takes_rows_of_each, monkeypatch
):
    monkeypatch.setattr(prefill, "_PADDING_OF_A_GROUP", 0 if run == "in groups" else 1000)
    if run == "in chunks":
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 4)
        monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)
    monkeypatch.setattr(
        forward_module, "_TAKES_ROWS_OF_EACH", takes_rows_of_each and forward_module._TAKES_ROWS_OF_EACH
    )
    model = tiny_model("llama")
    rows = prompts(V, (11, 3, 6, 8, 2, 14, 5))
    decoder = decoder_for(model, "fused")
    state = decoder.prefill(rows, repeats=2, num_unused=1)
    assert_drafts(decoder, state, [row for row in rows for _ in range(2)])


def test_compiled_forwards_bring_hidden_states_too():
    """Traced only: what a hook puts aside while code is traced does not outlive the trace."""
    model = tiny_model("llama", num_hidden_layers=1)
    rows = prompts(V, (3, 6))
    decoder = decoder_for(model, "fused", routed=False, compile_step=lambda run: torch.compile(run, backend="eager"))
    with decoder.attached():
        state = decoder.prefill(rows)
        for _ in range(2):
            decoder.step(state)
            assert_drafts(decoder, state, rows)
    assert compiled(lambda x: (x, None))(1) == (1, None)


def test_packed_weights_draft_what_the_layers_own_draft(tiny_base, tokenizer):
    ours = headed(tiny_base)
    prompt = tokenizer("class Node:\n    def __init__(self").input_ids
    out = ours.generate(prompt, max_new_tokens=32)
    assert ours.engines._linears[True].modules
    target, adapter = ours.target, ours.adapter
    head, no_eos = HeadDrafter.of(adapter, target), torch.empty(0, dtype=torch.long)
    forward = RowForward(target, adapter.mask_embeddings, LoraGate(tiny_base, adapter.lora), tap=head.tap)
    decoder = Decoder(forward, "fused", K, TokenLaw(True), 32, no_eos, head=head)
    with decoder.attached():
        state = decoder.prefill([prompt])
        while not state.done.all():
            decoder.step(state)
    assert out.token_ids == [state.output[0, :32].tolist()] == [plain_generate(tiny_base, prompt, 32)]
    assert out.counts[0].accepted == [accepted for accepted, _ in state.rounds()[0]]


# ---------------------------------------------------------------------- tokens


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    model = tiny_model(request.param)
    rows = prompts(V)
    return model, rows, [plain_generate(model, row, 20) for row in rows]


@pytest.mark.parametrize("options", [{}, {"mode": "two_pass"}, {"block_lengths": (2, 1, 0)}], ids=str)
def test_tokens_are_generates_own(family, options):
    model, rows, references = family
    ours = headed(model)
    assert ours.generate(rows, max_new_tokens=20, **options).token_ids == references
    assert ours.generate(rows[2], max_new_tokens=20, **options).token_ids == references[2:3]


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
def test_a_head_of_zeros_that_scores_all_tokens_drafts_what_no_head_drafts(family, mode):
    model, rows, _ = family
    adapter = headed(model, shortlist=V).adapter
    zeros = {name: tensor * 0 for name, tensor in adapter.head.items()}
    silent = SelfSpeculativeModel(model, None, dataclasses.replace(adapter, head=zeros))
    found, without = (silent.generate(rows, max_new_tokens=20, mode=mode, use_head=use) for use in (None, False))
    assert found.token_ids == without.token_ids
    assert [one.accepted for one in found.counts] == [one.accepted for one in without.counts]


def test_several_sequences_streams_and_the_door_bring_the_same(family):
    model, rows, references = family
    ours, row, reference = headed(model), rows[0], references[0]
    out = ours.generate(row, max_new_tokens=20, num_return_sequences=2)
    assert out.token_ids == [reference] * 2
    chunks = list(ours.stream(row, max_new_tokens=20))
    assert [token for chunk in chunks for token in chunk.token_ids] == reference
    accepted = out.counts[0].accepted
    assert [chunk.num_accepted_tokens for chunk in chunks][1:-1] == accepted[:-1]
    found = model.generate(torch.tensor([row]), custom_generate=ours, max_new_tokens=20, do_sample=False, use_head=True)
    assert found[0, len(row) :].tolist() == reference
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------- with and without


@pytest.fixture(scope="module")
def ours():
    return headed(tiny_model("mistral-window"))


def test_one_adapter_is_compared_with_and_without_its_head(ours):
    rows = prompts(V)
    bare = SelfSpeculativeModel(ours.base_model, None, make_adapter(ours.base_model, K, lora_rank=2))
    counts = {}
    for use_head in (None, True, False):
        out = ours.generate(rows, max_new_tokens=40, use_head=use_head)
        counts[use_head] = [one.accepted for one in out.counts]
        chunks = list(ours.stream(rows[0], max_new_tokens=40, use_head=use_head))
        assert [chunk.num_accepted_tokens for chunk in chunks][1:-1] == counts[use_head][0][:-1]
    assert counts[None] == counts[True] != counts[False]
    assert counts[False] == [one.accepted for one in bare.generate(rows, max_new_tokens=40).counts]


@pytest.mark.filterwarnings("ignore:(a step of .*|prompts) cannot be captured")  # on a CPU
def test_engines_that_are_kept_for_later_calls_are_kept_apart(ours):
    kept, rows = headed(ours.base_model), prompts(V)
    kept.capture = True
    for use_head in (True, False, True, False):
        found = kept.generate(rows, max_new_tokens=40, use_head=use_head).counts
        expected = ours.generate(rows, max_new_tokens=40, use_head=use_head).counts
        assert [one.accepted for one in found] == [one.accepted for one in expected]
    assert len(kept.engines._pool._idle) == 2


def test_a_head_that_is_not_there_cannot_be_used(ours):
    bare = SelfSpeculativeModel(ours.base_model, None, make_adapter(ours.base_model, K))
    for call in (bare.generate, bare.stream):
        with pytest.raises(ValueError, match="use_head: expected an adapter with a sampler head, found none"):
            call([5, 3], use_head=True)
    assert bare.generate([5, 3], max_new_tokens=4, use_head=False).token_ids == [
        plain_generate(ours.base_model, [5, 3], 4)
    ]
    assert ours.generate([5, 3], max_new_tokens=4, mode="plain", use_head=True).stats.num_drafts == 0


@pytest.mark.parametrize("options", [{"mode": "plain"}, {"num_speculative_tokens": 0}, {"use_head": False}], ids=str)
def test_plain_mode_and_calls_without_the_head_run_no_code_of_it(ours, options, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("code of the head ran")

    monkeypatch.setattr(drafting, "draft_in_turn", forbidden)
    monkeypatch.setattr(HiddenTap, "attached", forbidden)
    ours.generate([5, 3, 8], max_new_tokens=8, **options)
    with pytest.raises(AssertionError, match="code of the head ran"):
        ours.generate([5, 3, 8], max_new_tokens=8)


def test_greedy_steps_of_a_float32_model_make_no_scores(monkeypatch):
    model = tiny_model("llama", dtype=torch.float32)
    rows, ours = prompts(V), headed(model)
    expected = ours.generate(rows, max_new_tokens=8).token_ids

    def forbidden(*args):
        raise AssertionError("scores of whole rows were made")

    monkeypatch.setattr(TokenLaw, "scores", forbidden)
    assert ours.generate(rows, max_new_tokens=8).token_ids == expected


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("draft_input", ["mask_embeddings", "uniform_noise"])
def test_a_head_is_loaded_in_the_dtype_of_the_base(packaged_adapter, tmp_path, draft_input):
    save_adapter(packaged_adapter(K, lora_rank=2, head_width=6, draft_input=draft_input), tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = pardec.load(tmp_path, device="cpu", dtype=dtype)
        assert {p.dtype for p in model.engines.head.head.parameters()} == {getattr(torch, dtype)}
        assert model.engines.head.shortlist == SHORTLIST
        out = model.generate("def main():\n", max_new_tokens=8, block_lengths=full_blocks(2))
        assert out.counts[0].drafted[0] == 2


@pytest.mark.parametrize(("hidden_dim", "embedding_dim"), [(-1, 1), (1, 0), (0, -1)])
def test_a_head_of_another_width_is_refused(tiny_base, packaged_adapter, tmp_path, hidden_dim, embedding_dim):
    D = tiny_base.get_input_embeddings().weight.shape[1]
    H, E = D + hidden_dim, D + embedding_dim
    head = {"inner.weight": torch.zeros(6, H + E), "inner.bias": torch.zeros(6), "outer.weight": torch.zeros(H, 6)}
    save_adapter(dataclasses.replace(packaged_adapter(K, head_width=6), head=head), tmp_path)
    words = f"head: expected hidden states of width {D} and embeddings of width {D}, found {H} and {E}"
    with pytest.raises(AdapterError, match=words):
        pardec.load(tmp_path, base=tiny_base)


def test_making_a_model_with_a_head_draws_no_random_numbers():
    """Training makes one for every measurement; its own draws must not depend on when that was."""
    base = tiny_model("llama")
    adapter = make_adapter(base, 2, head_width=4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    SelfSpeculativeModel(base, None, adapter)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
def test_an_output_head_that_was_replaced_is_the_one_that_drafts_are_made_by(mode):
    model = tiny_model("llama")
    ours, row = headed(model), prompts(V)[0]
    before = ours.generate(row, max_new_tokens=8, mode=mode).token_ids
    torch.manual_seed(3)
    model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, V, dtype=torch.float64))
    expected = [plain_generate(model, row, 8)]
    assert expected != before
    assert ours.generate(row, max_new_tokens=8, mode=mode).token_ids == expected
