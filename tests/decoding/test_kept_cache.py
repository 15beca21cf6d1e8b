"""What is kept from call to call: the tokens of fresh runs, of which only what is new is run."""

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from recorded_steps import decoder_for, tape
from tiny_models import make_adapter, tiny_model

from pardec.decoding import prefill
from pardec.decoding.engine import Engine
from pardec.decoding.kept_cache import KeptCache
from pardec.decoding.sampling import TokenLaw
from pardec.model import SelfSpeculativeModel

K = 3
V = 61
MODES = ["plain", "two_pass", "fused"]
FAMILIES = ["llama", "gemma3-mixed-windows", "mistral-window", "gpt2", "llama-eager", "phi3-window"]


class Widths:
    """Counts the rows that the base embeds: those of real tokens, as mask tokens have embeddings of their own."""

    def __init__(self, model):
        self.widths: list[int] = []
        model.get_input_embeddings().register_forward_hook(self.note)

    def note(self, module, args, output):
        self.widths.append(args[0].shape[1])


def streamed(model, prompt, *, num_chunks: int | None = None, **options) -> list[int]:
    """The ids of a stream that is left after so many chunks."""
    stream, found = model.stream(prompt, **options), []
    for number, chunk in enumerate(stream, start=1):
        found += chunk.token_ids
        if number == num_chunks:
            break
    stream.close()
    return found


def conversation(num_turns: int, length: int = 7) -> list[list[int]]:
    return prompts(V, (23, *[length] * (num_turns - 1)))


@pytest.fixture(scope="module", params=FAMILIES)
def talk(request):
    """A model, and what it answers to each turn of a conversation."""
    model, said, answers = tiny_model(request.param), [], []
    for turn in conversation(4):
        answers.append(plain_generate(model, said + turn, 12))
        said += turn + answers[-1]
    return model, answers


@pytest.mark.parametrize("mode", MODES)
def test_every_turn_gives_the_tokens_of_a_fresh_run(talk, mode):
    model, answers = talk
    ours, kept, said = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache(), []
    for turn, answer in zip(conversation(4), answers, strict=True):
        prompt = said + turn
        new = streamed(ours, prompt, mode=mode, max_new_tokens=12, kept=kept)
        assert new == answer
        # all that was committed, which is everything but the newest token
        assert kept.num_reused == max(len(said) - 1, 0)
        said = prompt + new


@pytest.mark.parametrize(
    "parts", [{}, {"lora_rank": 2, "head_width": 8}, {"lora_rank": 2, "draft_input": "uniform_noise"}]
)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_sampled_is_what_a_fresh_run_samples(mode, parts):
    model = tiny_model("gemma3-mixed-windows")
    ours, kept, said = SelfSpeculativeModel(model, None, make_adapter(model, K, **parts)), KeptCache(), []
    for number, turn in enumerate(conversation(3)):
        options = {"mode": mode, "max_new_tokens": 12, "temperature": 0.8, "top_k": 12, "seed": number}
        new = streamed(ours, said + turn, kept=kept, **options)
        assert new == ours.generate(said + turn, **options).token_ids[0]
        said += turn + new


def test_drafts_are_accepted_as_in_a_fresh_run():
    model = tiny_model("llama")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2, head_width=8))
    prompt, kept = conversation(1)[0], KeptCache()
    streamed(ours, prompt[:9], max_new_tokens=2, kept=kept)
    kept_chunks = list(ours.stream(prompt, max_new_tokens=40, kept=kept))
    assert kept.num_reused == 9
    assert kept_chunks == list(ours.stream(prompt, max_new_tokens=40))


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_new_is_run(mode):
    model = tiny_model("llama")
    ours, kept = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache()
    prompt, rows = conversation(1)[0], Widths(model)  # a hook that comes later would make another model of it
    said = prompt + streamed(ours, prompt, mode=mode, max_new_tokens=8, kept=kept)
    rows.widths.clear()
    streamed(ours, [*said, 5, 6, 7], mode=mode, max_new_tokens=1, kept=kept)
    assert rows.widths == [3, 1]  # the answer's newest token and two of three; then the last, with mask tokens behind


@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_departs_from_what_is_kept_shares_its_beginning_alone(mode):
    model = tiny_model("mistral-window")
    ours, kept = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache()
    first, other = conversation(1)[0], [60, 1, 2, 3]
    said = first + streamed(ours, first, mode=mode, max_new_tokens=12, kept=kept)
    cases = ((said[:29] + other, 29), (first[:4] + other, 4), (other, 0), (other, 3), (other[:1], 0), (said, 0))
    for prompt, num_reused in cases:
        assert streamed(ours, prompt, mode=mode, max_new_tokens=6, kept=kept) == plain_generate(model, prompt, 6)
        assert kept.num_reused == num_reused, prompt


def test_modes_and_shapes_may_change_from_turn_to_turn():
    model = tiny_model("gemma3-mixed-windows")
    ours, kept, said = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache(), []
    ways = ({}, {"mode": "plain"}, {"mode": "two_pass"}, {"block_lengths": [2, 1, 0]}, {"num_speculative_tokens": 1})
    for turn, way in zip(conversation(5), ways, strict=True):
        new = streamed(ours, said + turn, max_new_tokens=12, kept=kept, **way)
        assert new == plain_generate(model, said + turn, 12)
        assert kept.num_reused == max(len(said) - 1, 0)
        said += turn + new


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_is_left_early_keeps_what_was_said(mode, num_chunks):
    model = tiny_model("llama")
    ours, kept = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache()
    prompt = conversation(1)[0]
    said = prompt + streamed(ours, prompt, mode=mode, max_new_tokens=30, kept=kept, num_chunks=num_chunks)
    assert kept.token_ids == said[:-1]
    assert streamed(ours, [*said, 5], mode=mode, max_new_tokens=9, kept=kept) == plain_generate(model, [*said, 5], 9)
    assert kept.num_reused == len(said) - 1


@pytest.mark.parametrize("mode", MODES)
def test_what_lies_behind_an_end_is_not_kept(mode):
    model = tiny_model("llama")
    ours, kept = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache()
    prompt = conversation(1)[0]
    free = plain_generate(model, prompt, 30)
    model.generation_config.eos_token_id = free[7]
    said = prompt + streamed(ours, prompt, mode=mode, max_new_tokens=30, kept=kept)
    assert said == prompt + free[: free.index(free[7]) + 1]
    assert streamed(ours, [*said, 5], mode=mode, max_new_tokens=9, kept=kept) == plain_generate(model, [*said, 5], 9)
    assert kept.num_reused == len(said) - 1


def test_a_long_turn_is_run_in_chunks(monkeypatch):
    monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 4)
    monkeypatch.setattr(prefill, "_MIN_CHUNK_TOKENS", 4)
    model = tiny_model("mistral-window")
    ours, kept, said = SelfSpeculativeModel(model, None, make_adapter(model, K)), KeptCache(), []
    rows = Widths(model)
    for turn in conversation(3, length=14):
        new = streamed(ours, said + turn, max_new_tokens=5, kept=kept)
        assert max(rows.widths) <= 4
        assert new == plain_generate(model, said + turn, 5)
        rows.widths.clear()
        said += turn + new


def test_one_that_is_kept_serves_calls_that_are_read_in_turn():
    model = tiny_model("llama")
    ours, kept = SelfSpeculativeModel(model, None, make_adapter(model, K)), KeptCache()
    prompt = conversation(1)[0]
    said = prompt + streamed(ours, prompt, max_new_tokens=8, kept=kept)
    both = [[*said, 5], [*said, 6]]
    streams = [ours.stream(one, max_new_tokens=9, kept=kept) for one in both]
    found = [[], []]
    for chunks in zip(*streams, strict=False):
        for tokens, chunk in zip(found, chunks, strict=True):
            tokens += chunk.token_ids
    for tokens, one in zip(found, both, strict=True):
        assert tokens == plain_generate(model, one, 9)[: len(tokens)]


def test_another_model_and_other_weights_run_everything():
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    kept, prompt = KeptCache(), conversation(1)[0]
    for model in (one, other):
        found = streamed(SelfSpeculativeModel(model, None, None), prompt, mode="plain", max_new_tokens=6, kept=kept)
        assert found == plain_generate(model, prompt, 6)
        assert kept.num_reused == 0
    ours, layer = SelfSpeculativeModel(one, None, None), one.model.layers[0].mlp.up_proj

    def replace():
        layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)

    for change in (replace, lambda: layer.weight.mul_(2)):
        streamed(ours, prompt, mode="plain", max_new_tokens=6, kept=kept)
        change()
        assert streamed(ours, prompt, mode="plain", max_new_tokens=6, kept=kept) == plain_generate(one, prompt, 6)
        assert kept.num_reused == 0


WEIGHTS = {
    "linear layer": lambda model: model.model.layers[1].mlp.up_proj.weight,
    "norm": lambda model: model.model.layers[0].input_layernorm.weight,
    "embeddings": lambda model: model.get_input_embeddings().weight,
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("mode", ["fused", "plain"])
def test_weights_that_are_written_to_past_torch_run_everything(kind, mode):
    model = tiny_model("llama")
    ours, kept = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2)), KeptCache()
    prompt = prompts(V, (9,))[0]
    for factor, num_reused in ((1, 0), (1, 8), (-3, 0), (1, 8), (-1, 0), (1, 8)):
        WEIGHTS[kind](model).data.mul_(factor)
        found = streamed(ours, prompt, mode=mode, max_new_tokens=6, kept=kept)
        assert found == plain_generate(model, prompt, 6)
        assert kept.num_reused == num_reused


@pytest.mark.parametrize("written", ["buffer", "tensor that is no parameter"])
def test_what_is_no_parameter_and_written_to_is_noticed_too(written):
    one = tiny_model("llama")
    ours, kept, prompt = SelfSpeculativeModel(one, None, None), KeptCache(), prompts(V, (20,))[0]
    layer = one.model.layers[0].mlp.down_proj
    if written == "buffer":
        place = one.model.rotary_emb.inv_freq
    else:
        place = layer.weight.detach().clone()
        del layer._parameters["weight"]
        layer.weight = place
    streamed(ours, prompt, mode="plain", max_new_tokens=6, kept=kept)
    assert streamed(ours, prompt, mode="plain", max_new_tokens=6, kept=kept)
    assert kept.num_reused
    with torch.no_grad():
        place.mul_(-3)
    assert streamed(ours, prompt, mode="plain", max_new_tokens=6, kept=kept) == plain_generate(one, prompt, 6)
    assert kept.num_reused == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_with_captured_steps_goes_on_in_the_cache_of_its_graphs(mode):
    model = tiny_model("gemma3-mixed-windows")
    engine = Engine(decoder_for(model, mode, TokenLaw(greedy=True)), 1, captured=True, recorder=tape)
    kept, said, caches = KeptCache(), [], []
    for turn in conversation(4):
        prompt = said + turn
        begun = kept.begin(prompt, None)
        new = [t for step in engine.run([prompt], kept=begun, num_kept=kept.num_reused) for t in step.tokens[0]]
        assert new == plain_generate(model, prompt, 12)
        assert kept.num_reused == max(len(said) - 1, 0)
        kept.keep(engine.state, prompt, None)
        caches.append(engine.state.cache)
        list(engine.run([[9, 8, 7] * 12]))  # another's, in between
        said = prompt + new
    assert caches[2] is caches[3]  # those before were too short


def test_a_weight_at_the_very_place_of_one_that_has_gone_is_another():
    """As a new one may lie where the old one did, and as often written to: only that it is another object tells."""
    model = tiny_model("llama", dtype=torch.float32)
    ours, kept, prompt = SelfSpeculativeModel(model, None, make_adapter(model, K)), KeptCache(), prompts(V, (12,))[0]
    layer = model.model.layers[0].self_attn.v_proj
    numbers = layer.weight.detach().clone()
    layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
    before = streamed(ours, prompt, max_new_tokens=12, kept=kept)
    numbers.numpy()[:] *= -1.2
    layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
    expected = plain_generate(model, prompt, 12)
    assert expected != before
    assert streamed(ours, prompt, max_new_tokens=12, kept=kept) == expected
    assert kept.num_reused == 0
