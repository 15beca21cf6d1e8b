"""Copied tokens: which they are, by nested loops; that output is `generate`'s with them; and when they are taken."""

import random

import pytest
import torch
from copying_oracle import copied
from covering import every_pair
from greedy_oracle import plain_generate, prompts, tokens_of_generate
from planted_drafts import PlantedDrafts
from recorded_steps import tape
from tiny_models import FAMILIES, make_adapter, tiny_model

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding import engine as engine_module
from pardec.decoding.copying import MARGIN, Copier, Texts, begin_context, num_sources, sources_of
from pardec.decoding.engine import Engine
from pardec.decoding.output import outputs_of
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.target.forward import TargetModel

K, L = 2, 3
NEW_TOKENS = 26
# ---------------------------------------------------------------------- which tokens are copied


@pytest.mark.parametrize("num_tokens", [2, 3, 12])
def test_copies_are_what_followed_the_longest_and_last_earlier_match(num_tokens):
    source, seen = random.Random(num_tokens), 0
    for _ in range(200):
        lengths = [source.randint(2, 30) for _ in range(4)]
        drafted = [source.randint(0, min(3, n - 2)) for n in lengths]
        texts = [[source.randrange(num_tokens) for _ in range(n)] for n in lengths]
        width = 5
        behind = [source.randrange(num_tokens) for _ in range(40)]  # stale: nobody may look at it
        context = begin_context(torch.tensor([(text + behind)[:40] for text in texts]), 40)
        first = torch.tensor([n - d for n, d in zip(lengths, drafted, strict=True)])
        texts_of = Texts(context, first, torch.arange(4)[:, None])
        found = Copier(width, context.device).candidates(texts_of, first, torch.tensor(drafted))
        for b, (text, d) in enumerate(zip(texts, drafted, strict=True)):
            copies = copied(text, width - d)
            seen += bool(copies)
            assert found.num_copies is not None
            assert int(found.num_copies[b]) == len(copies)
            assert int(found.length[b]) == d + len(copies)
            drafts = text[len(text) - d :]
            assert found.ids[b, : int(found.length[b])].tolist() == drafts + copies
            assert int(found.ids[b].min()) >= 0  # what does not exist can still be embedded
    assert 0 < seen < 800


@pytest.mark.parametrize("num_tokens", [2, 3, 12])
def test_rows_look_in_the_texts_of_others_up_to_what_these_have_emitted(num_tokens):
    """Two prompts with rows of texts of any length behind them, drafts behind these, and rows in another order."""
    source, from_others = random.Random(num_tokens), 0
    for _ in range(100):
        first = [source.randrange(num_tokens) for _ in range(source.randint(1, 9))]
        prompts_of = [first, [*first, 0]]
        texts = [
            prompts_of[n % 2] + [source.randrange(num_tokens) for _ in range(source.randint(1, 20))] for n in range(7)
        ]
        drafts = [[source.randrange(num_tokens) for _ in range(source.randint(0, 3))] for _ in texts]
        stale = [source.randrange(num_tokens) for _ in range(40)]
        context = begin_context(torch.tensor([[*t, *d, *stale][:40] for t, d in zip(texts, drafts, strict=True)]), 40)
        sources = sources_of([prompts_of[n % 2] for n in range(7)])
        assert sources == [[n, *((n + 2 * i) % (8 - n % 2 * 2) for i in range(1, 4))] for n in range(7)]
        rows, width = source.sample(range(7), 4), 6  # some have left the batch, whose texts are looked in
        lengths = torch.tensor([len(text) for text in texts])
        found = Copier(width, context.device).candidates(
            Texts(context, lengths, torch.tensor(sources)[rows]),
            lengths[rows],
            torch.tensor([len(drafts[n]) for n in rows]),
        )
        for b, n in enumerate(rows):
            text, d = texts[n] + drafts[n], len(drafts[n])
            copies = copied(text, width - d, [texts[other] for other in sources[n][1:]])
            from_others += copies != copied(text, width - d)
            assert found.ids[b, : int(found.length[b])].tolist() == drafts[n] + copies
            assert int(found.ids[b].min()) >= 0
    assert from_others > 50


def test_rows_of_one_prompt_look_in_each_others_texts_and_in_few_of_many():
    one, other = [5, 6], [7]
    assert sources_of([one, other]) == [[0], [1]]
    assert sources_of([one, one, other], num_unused=1) == [[0, 1], [1, 0], [2, 2], [3, 3]]
    assert num_sources([one, other], 1) == 1
    assert num_sources([one, [5, 6], other], 1) == 2
    many = sources_of([one] * 20)
    assert many[0] == list(range(8))
    assert many[17] == [17, 18, 19, 0, 1, 2, 3, 4]
    assert num_sources([one], 20) == num_sources([one] * 20, 1) == 8


def test_a_loop_goes_on_as_it_went():
    context = begin_context(torch.tensor([[9, 1, 2, 3, 1, 2, 3, 0, 0, 0]]), 10)
    texts = Texts(context, torch.tensor([7]), torch.tensor([[0]]))
    found = Copier(7, context.device).candidates(texts, torch.tensor([7]), torch.tensor([0]))
    assert found.ids.tolist() == [[1, 2, 3, 1, 2, 3, 1]]


# ---------------------------------------------------------------------- greedy, token for token


def decoder_for(model, mode: str, block_lengths=None, *, num_drafts: int = K, new_tokens: int = NEW_TOKENS) -> Decoder:
    target, adapter = TargetModel.wrap(model), make_adapter(model, K, lora_rank=2)
    no_eos = torch.empty(0, dtype=torch.long)
    law = TokenLaw(greedy=True)
    forward = RowForward(target)
    if num_drafts:
        forward = RowForward(target, adapter.mask_embeddings.to(target.dtype), LoraGate(model, adapter.lora))
    return Decoder(forward, mode, num_drafts, law, new_tokens, no_eos, block_lengths, copy_tokens=L)


LENGTHS = (40, 33, 47, 36)  # prompts that what will come can be planted into


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    rows = prompts(61, LENGTHS)
    return tiny_model(request.param), rows, tokens_of_generate(request.param, 61, NEW_TOKENS + K + L + 2, LENGTHS)


def planted(reference: list[int], length: int, wrong_every: int) -> list[int]:
    """So many tokens, those of `reference` but for one in `wrong_every`."""
    tokens = [60 - t if i % wrong_every == wrong_every - 1 else t for i, t in enumerate(reference)]
    return (tokens + [60] * length)[:length]


def run_planted(decoder: Decoder, rows, references, num_true: list[int], wrong_every: int) -> DecodeState:
    """Decodes with num_true[b] true drafts in row b, and copies that are true but for one token in `wrong_every`.

    Copies come from a context whose prompt has been replaced by what will be emitted; the model does not read it.
    """
    plan = PlantedDrafts(decoder, references, num_true)
    with torch.no_grad(), decoder.attached():
        plan.state = state = decoder.prefill(rows)
        assert state.context is not None
        for b, reference in enumerate(references):
            P = len(rows[b])
            state.context[b, MARGIN : MARGIN + P] = torch.tensor(planted(reference, P, wrong_every))
        while not state.done.all():
            if decoder.mode == "fused" and decoder.num_speculative_tokens:
                state.drafts = plan.drafts()
            decoder.step(state)
    return state


SHAPES = [
    ("fused", K, None),
    ("fused", K, (2, 1, 0, 2, 1, 2)),
    ("fused", 0, None),
    ("two_pass", K, None),
]


def expected_rounds(decoder: Decoder, prompt: list[int], reference: list[int], num_true: int):
    """(accepted drafts, drafts) and (accepted copies, copies) of each round, in plain Python; `prompt` as planted."""
    K, blocks = decoder.num_speculative_tokens, decoder.block_lengths
    text, n, drafted, drafts, copies = [*prompt, reference[0]], 1, K, [], []
    while n < NEW_TOKENS:
        if decoder.mode == "two_pass":
            text, n = [*text, reference[n]], n + 1
        made = [t if i < num_true else (t + 1) % 61 for i, t in enumerate(reference[n : n + drafted])]
        candidates = made + copied([*text, *made], K + L - drafted)
        pairs = zip(candidates, reference[n:], strict=False)
        accepted = [mine == theirs for mine, theirs in [*pairs, (0, 1)]].index(False)
        drafts.append((min(accepted, drafted), drafted))
        copies.append((max(accepted - drafted, 0), len(candidates) - drafted))
        text, n = text + reference[n : n + accepted + 1], n + accepted + 1
        if decoder.mode == "fused":
            drafted = (blocks or (*(K,) * (K + 1), *(0,) * L))[accepted]
    return drafts, copies


@pytest.mark.parametrize(
    ("family", "shape", "wrong_every", "batch"),
    every_pair(list(FAMILIES), SHAPES, [4, 100], [1, 4]),
    indirect=["family"],
)
def test_tokens_are_generates_and_copies_are_accepted_up_to_the_first_that_is_wrong(family, shape, wrong_every, batch):
    mode, num_drafts, block_lengths = shape
    model, rows, references = family
    rows, references = rows[:batch], references[:batch]
    num_true = [(num_drafts + b) % (num_drafts + 1) for b in range(batch)]  # another number in every row
    decoder = decoder_for(model, mode, block_lengths, num_drafts=num_drafts)
    state = run_planted(decoder, rows, references, num_true, wrong_every)
    assert state.output[:, :NEW_TOKENS].tolist() == [row[:NEW_TOKENS] for row in references]
    for b, reference in enumerate(references):
        prompt = planted(reference, len(rows[b]), wrong_every)
        assert (state.rounds()[b], state.copies()[b]) == expected_rounds(decoder, prompt, reference, num_true[b])
    assert wrong_every == 4 or any(copied for copied, _ in state.copies()[0])


@pytest.mark.parametrize(("mode", "num_drafts", "block_lengths"), SHAPES)
def test_eos_ends_a_sequence_wherever_it_falls_among_the_copies(mode, num_drafts, block_lengths):
    model, row = tiny_model("llama"), prompts(61, LENGTHS)[0]
    reference = plain_generate(model, row, NEW_TOKENS)
    for end in range(1, 14):
        expected = plain_generate(model, row, NEW_TOKENS, eos_token_id=reference[end], pad_token_id=0)
        decoder = decoder_for(model, mode, block_lengths, num_drafts=num_drafts)
        decoder.eos_token_ids = torch.tensor([reference[end]])
        if len(expected) > 1:
            state = run_planted(decoder, [row], [reference], [num_drafts], 100)
            assert state.output[0, : int(state.num_new[0])].tolist() == expected
            assert any(copied for copied, _ in state.copies()[0]) or len(expected) < 8


@pytest.mark.parametrize("limit", range(2, 14))
@pytest.mark.parametrize(("mode", "num_drafts", "block_lengths"), SHAPES)
def test_the_length_limit_cuts_inside_of_copies(mode, num_drafts, block_lengths, limit):
    model, row = tiny_model("llama"), prompts(61, LENGTHS)[0]
    reference = tokens_of_generate("llama", 61, NEW_TOKENS, LENGTHS)[0]
    decoder = decoder_for(model, mode, block_lengths, num_drafts=num_drafts, new_tokens=limit)
    state = run_planted(decoder, [row], [reference], [num_drafts], 100)
    assert state.output[0, : int(state.num_new[0])].tolist() == reference[:limit]


def test_captured_steps_copy_what_steps_that_run_copy():
    """Calls of other prompts, numbers of them and lengths, on one engine whose tensors and recordings stay."""
    model = tiny_model("llama")
    row = prompts(61, LENGTHS)[0]
    calls = [([row[:9] * 3], 20), ([row[:9], row[:7] * 3], 12), ([row[:4] * 5, row[:5], row[:3] * 6], 30), ([row], 9)]
    found = []
    for captured in (False, True):
        engine = Engine(decoder_for(model, "fused", num_drafts=0), 1, captured=captured, recorder=tape)
        found.append([])
        for rows, new_tokens in calls:
            engine.decoder.max_new_tokens = new_tokens
            steps, n = list(engine.run(rows)), len(rows)
            copied = [sum(one.num_copied[b] for one in steps if one.tokens[b]) for b in range(n)]
            found[-1].append((outputs_of(engine.state, n), engine.state.copies()[:n], copied))
    assert found[0] == found[1]
    for (rows, new_tokens), (outputs, copies, copied) in zip(calls, found[0], strict=True):
        assert outputs == [plain_generate(model, one, new_tokens) for one in rows]
        assert copied == [sum(accepted for accepted, _ in each) for each in copies]
    assert sum(sum(copied) for _, _, copied in found[0]) > 20


@pytest.mark.parametrize(("mode", "num_drafts", "block_lengths"), SHAPES)
def test_a_step_on_a_cpu_leaves_out_the_rows_of_copies_that_no_sequence_has(mode, num_drafts, block_lengths):
    """Prompts whose tokens are all different, behind which nothing repeats itself for a while, and rows that leave."""
    model = tiny_model("llama")
    rows = [list(range(1, 30)), list(range(30, 40)), list(range(40, 59))]
    references = [plain_generate(model, row, NEW_TOKENS) for row in rows]
    decoder = decoder_for(model, mode, block_lengths, num_drafts=num_drafts)
    decoder.eos_token_ids = torch.tensor([references[1][5]])
    expected = [reference[: reference.index(references[1][5]) + 1] if references[1][5] in reference else reference
        for reference in references]  # fmt: skip
    engine, widths = Engine(decoder, 1), []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    for _ in engine.run(rows, between="nothing"):
        pass
    handle.remove()
    assert outputs_of(engine.state, 3) == expected
    steps = widths[-2 * len(engine.state.rounds()[0]) :] if mode == "two_pass" else widths[1:]
    num_copied = [max(n) for n in zip(*([c for _, c in each] for each in engine.state.copies()), strict=False)]
    whole = decoder.rows_per_step if mode == "fused" else num_drafts + L + 1
    blocks = (num_drafts,) * (num_drafts + 1) if block_lengths is None else block_lengths[: num_drafts + 1]
    short = len(blocks) + sum(blocks) if mode == "fused" else num_drafts + 1
    seen = set(steps[1::2] if mode == "two_pass" else steps)
    assert seen == {whole, short} if any(num_copied) else seen == {short}


def test_a_row_that_has_ended_behind_more_tokens_than_the_others_attend_to_is_no_matter(monkeypatch):
    """Attention sees as many slots as the longest row that goes on needs."""
    monkeypatch.setattr(engine_module, "bucket", lambda num_slots, *, few, coarse: num_slots)
    model = tiny_model("llama")
    long, short = prompts(61, (60, 5))
    ends = plain_generate(model, long, 2)
    engine = Engine(decoder_for(model, "fused"), 1)
    engine.decoder.eos_token_ids, engine.decoder.max_new_tokens = torch.tensor([ends[1]]), 20
    seen = [engine.state.cache.num_used for _ in engine.run([long, short])]
    assert min(seen) < len(long)
    expected = [plain_generate(model, row, 20, eos_token_id=ends[1], pad_token_id=0) for row in (long, short)]
    assert outputs_of(engine.state, 2) == expected
