"""Rows that are done leave a batch: the others' tokens, counts and laws stay, and what is left is a smaller batch."""

import warnings
from collections import Counter

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from recorded_steps import decoder_for, rerun, results, sampled
from sampling_oracle import PROMPT, WARPERS, Z_LIMIT, chi_square_z, joint_law, thin_model
from sampling_oracle import K as DRAFTS
from sampling_oracle import V as FEW
from tiny_models import make_adapter, tiny_model

from pardec.decoding.engine import Engine
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState, LiveRows
from pardec.decoding.step import MODES
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache

K, V = 3, 61
NEW = 20
LENGTHS = (5, 2, 9, 11, 3, 7)
FAMILIES = ["llama", "gemma3-mixed-windows", "mistral-window", "gpt2"]


def state_of(num_rows: int) -> DecodeState:
    """Whose row b holds 100 b in every slot of the cache and 10 b as its only token."""
    cache = SlotCache(1, 4, num_rows)
    number = torch.arange(num_rows)
    filled = (100.0 * number)[:, None, None, None].expand(-1, 1, 4, 2)
    cache.update(filled.clone(), filled.clone(), 0)
    state = DecodeState.begin(
        cache, number[:, None], torch.ones(num_rows).long(), torch.tensor([60]), room=torch.full((num_rows,), 9),
        drafts=torch.zeros(num_rows, 0).long(), draft_probs=None, width=1, capacity=4,
    )  # fmt: skip
    state.emit(10 * number[:, None], torch.zeros(num_rows).long(), torch.arange(1))
    return state


def test_the_last_rows_move_up_into_the_gaps_and_are_back_in_their_places_at_the_end():
    whole = state_of(6)
    live = LiveRows(whole)
    live.leave([False] * 6)
    assert live.state is whole
    for done, sequences in (({1, 5}, [0, 4, 2, 3]), ({1, 5, 0, 3}, [2, 4]), ({0, 1, 2, 3, 5}, [4])):
        live.leave([b in done for b in range(6)])
        assert live.sequences == sequences
        assert live.state.output[:, 0].tolist() == [10 * b for b in sequences]
        assert live.state.prompts[:, 0].tolist() == sequences
        keys = live.state.cache.layers[0].keys
        assert keys[: len(sequences), 0, :, 0].tolist() == [[100.0 * b] * 4 for b in sequences]
        n = len(sequences)
        live.state.emit(live.state.bonus[:, None] + 1, torch.zeros(n).long(), torch.arange(1))
    live.leave([True] * 6)
    assert live.state is whole
    assert live.sequences == []
    steps = [1, 0, 2, 1, 3, 0]  # that each has seen
    assert whole.num_new.tolist() == [1 + n for n in steps]
    assert [row[: 1 + n] for row, n in zip(whole.output.tolist(), steps, strict=True)] == [
        [10 * b + i for i in range(1 + n)] for b, n in enumerate(steps)
    ]


def ragged_ends(model, rows: list[list[int]]) -> list[int]:
    """Two tokens that end some of these texts, at different places."""
    texts = [plain_generate(model, row, NEW) for row in rows]
    first, second = texts[0][3], next(token for token in texts[2][6:] if token not in texts[0][:3])
    return [first, second]


def alone(model, row: list[int], options: dict) -> list[int]:
    """The new tokens of transformers' own generate on one prompt."""
    return model.generate(torch.tensor([row]), **options)[0, len(row) :].tolist()


class Batches:
    """Notes how many sequences each forward has."""

    def __init__(self, model):
        self.sizes: list[int] = []
        self.handle = model.get_input_embeddings().register_forward_hook(self.note)

    def note(self, module, args, output):
        self.sizes.append(args[0].shape[0])

    def __enter__(self):
        return self.sizes

    def __exit__(self, *error):
        self.handle.remove()


@pytest.fixture(scope="module", params=FAMILIES)
def ragged(request):
    model = tiny_model(request.param)
    rows = prompts(V, LENGTHS)
    model.generation_config.eos_token_id = ragged_ends(model, rows)
    return model, rows, [plain_generate(model, row, NEW) for row in rows]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_texts_of_ragged_ends_are_those_of_generate(ragged, mode, repeats):
    model, rows, texts = ragged
    references = [text for text in texts for _ in range(repeats)]
    assert len({len(text) for text in references}) > 2
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    ours.generate(rows[:2], max_new_tokens=2, mode=mode)  # whatever is observed once has been observed
    with Batches(model) as sizes:
        out = ours.generate(rows, max_new_tokens=NEW, mode=mode, num_return_sequences=repeats)
    assert out.token_ids == references
    steps = sizes[1:]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == sum(len(text) > 1 for text in references) > steps[-1]


@pytest.mark.parametrize("head_width", [0, 8])
@pytest.mark.parametrize("mode", MODES)
def test_every_step_of_every_sequence_brings_what_it_brings_where_nobody_leaves(mode, head_width):
    """Tokens, accepted and drafted counts, and what is yielded after each step."""
    model = tiny_model("llama")
    rows = prompts(V, LENGTHS)
    decoder = decoder_for(
        model, mode, TokenLaw(True), new_tokens=NEW, eos=ragged_ends(model, rows), head_width=head_width
    )
    seen = []
    for between in ("reads", "nothing"):
        engine = Engine(decoder, 1)
        emitted = [[(p.num_new, p.done, p.tokens) for p in engine.run(rows, repeats=2, between=between)]]
        seen.append((emitted, results(decoder, engine.state), engine.state.done.tolist()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_rows_leave_behind_the_door_of_transformers_too(penalty):
    """With a processor that sees the tokens of its own row, which is another one later on."""
    model = tiny_model("llama")
    rows = prompts(V, LENGTHS)
    options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": penalty, "pad_token_id": 0}
    options |= {"eos_token_id": ragged_ends(model, rows)}
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2))
    width = max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    expected = [alone(model, row, options) for row in rows]
    with warnings.catch_warnings(), Batches(model) as sizes:
        warnings.simplefilter("ignore")  # the penalty runs row by row
        found = model.generate(ids, attention_mask=mask, custom_generate=ours, **options)
    assert [row[: len(text)] for row, text in zip(found[:, width:].tolist(), expected, strict=True)] == expected
    assert len({len(text) for text in expected}) > 2
    steps = sizes[sizes.index(len(rows)) :]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[1]


def test_rows_of_captured_steps_stay():
    model = tiny_model("llama")
    rows = prompts(V, LENGTHS[:4])
    ends = ragged_ends(model, rows)
    decoder = decoder_for(model, "fused", TokenLaw(True), new_tokens=NEW, eos=ends)
    engine = Engine(decoder, 1, captured=True, recorder=rerun)
    with Batches(model) as sizes:
        for _ in engine.run(rows, between="nothing"):
            pass
    assert set(sizes) == {4}
    expected = [plain_generate(model, row, NEW, eos_token_id=ends) for row in rows]
    assert [tokens for tokens, _, _ in results(decoder, engine.state)] == expected


@pytest.mark.parametrize("between", ["reads", "writes"])
def test_rows_stay_where_somebody_looks_at_the_state(between):
    model = tiny_model("llama")
    rows = prompts(V, LENGTHS)
    engine = Engine(decoder_for(model, "plain", sampled(), new_tokens=NEW, eos=range(0, V, 4)), 1)
    for progress in engine.run(rows, between=between):
        assert engine.state.num_new.tolist() == progress.num_new
        assert engine.state.done.tolist() == progress.done


# ---------------------------------------------------------------------- sampling


def cut(joint: dict[tuple[int, ...], float], eos: int) -> dict[tuple[int, ...], float]:
    """The law of texts that end with `eos`."""
    found: dict[tuple[int, ...], float] = {}
    for tokens, probability in joint.items():
        key = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        found[key] = found.get(key, 0.0) + probability
    return found


@pytest.mark.parametrize("mode", MODES)
def test_prompts_whose_rows_take_each_others_places_keep_their_laws(mode):
    toy, eos, samples = thin_model(FEW), 3, 3000
    toy.generation_config.eos_token_id = eos
    ours = SelfSpeculativeModel(toy, None, make_adapter(toy, DRAFTS, lora_rank=2))
    others, options = [PROMPT, [*PROMPT, 1, 4], [2]], WARPERS["temperature"]
    out = ours.generate(others * samples, max_new_tokens=4, mode=mode, seed=1, **options)
    for number, prompt in enumerate(others):
        counts = Counter(tuple(tokens) for tokens in out.token_ids[number :: len(others)])
        assert sum(counts.values()) == samples
        assert any(len(tokens) < 4 for tokens in counts)
        assert chi_square_z(counts, cut(joint_law(toy, prompt, 4, options), eos)) < Z_LIMIT


def test_the_same_seed_draws_the_same_where_rows_leave():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(0, V, 6))
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    first, again, other = (
        ours.generate(prompts(V, LENGTHS), max_new_tokens=NEW, temperature=1.0, seed=seed).token_ids
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({len(tokens) for tokens in first}) > 2
