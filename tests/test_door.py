"""The door from transformers: each field of a GenerationConfig is honoured, refused or of no matter."""

import warnings
from functools import partial

import pytest
import torch
from tiny_models import make_adapter, tiny_model
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig
from transformers.generation.stopping_criteria import StoppingCriteria

from pardec.model import SelfSpeculativeModel

K = 3
PROMPT = [5, 9, 2, 7, 7, 1, 5, 9, 2]
EOS = {"eos_token_id": 60, "pad_token_id": 0}
SAMPLED = {"do_sample": True}

# what decides the tokens, each with a value that leaves one token to choose from where it is drawn
HONOURED = {
    "max_length": {"max_length": 20, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 30, **EOS},
    "min_new_tokens": {"min_new_tokens": 14, **EOS},
    "max_time": {"max_time": 1e6},
    "do_sample": {"do_sample": True, "top_k": 1},
    "temperature": {**SAMPLED, "temperature": 1e-3, "top_k": 0},
    "top_k": {**SAMPLED, "top_k": 1},
    "top_p": {**SAMPLED, "top_p": 1e-6},
    "min_p": {**SAMPLED, "min_p": 1.0},
    "top_h": {**SAMPLED, "top_h": 1e-6},
    "typical_p": {**SAMPLED, "typical_p": 1e-6},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.9999},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.9999, "top_k": 1},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(0, 60, 2)]},
    "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 3},
    "forced_eos_token_id": {"forced_eos_token_id": 4},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0), **EOS},
    "suppress_tokens": {"suppress_tokens": list(range(0, 60, 3))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 60, 2))},
    "sequence_bias": {"sequence_bias": [[[7], 50.0]]},
    "guidance_scale": {"guidance_scale": 1.0},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "num_return_sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "pad_token_id": {"pad_token_id": 59},
    "bos_token_id": {"bos_token_id": 2},
    "eos_token_id": {"eos_token_id": list(range(0, 60, 4)), "pad_token_id": 0},
}  # fmt: skip

# what would be decoded in another way, or return more than ids
REFUSED = {
    "num_beams": ({"num_beams": 3}, "beam_search by num_beams=3"),
    "num_beam_groups": ({"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 1.0}, "group_beam_search by"),
    "constraints": ({"constraints": [1], "num_beams": 2}, "constrained_beam_search by"),
    "force_words_ids": ({"force_words_ids": [[3]], "num_beams": 2}, "constrained_beam_search by"),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search by penalty_alpha=0.6"),
    "dola_layers": ({"dola_layers": "high"}, "dola_generation by dola_layers='high'"),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "assisted_generation by prompt_lookup_num_tokens=3"),
    "assistant_early_exit": ({"assistant_early_exit": 1}, "assisted_generation"),
    "use_mtp": ({"use_mtp": True}, "assisted_generation by use_mtp=True"),
    "is_assistant": ({"is_assistant": True}, "is_assistant=False, found True"),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight=None, found 0.5"),
    "cache_implementation": ({"cache_implementation": "offloaded"}, "cache_implementation=dynamic or .*'offloaded'"),
    "output_scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=False"),
    "output_logits": ({"output_logits": True, "return_dict_in_generate": True}, "output_logits=False"),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=False"),
    "output_hidden_states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    # of what transformers says itself
    "stop_strings": ({"stop_strings": "x"}, "stop strings"),
    "token_healing": ({"token_healing": True}, "token healing"),
}  # fmt: skip

# what changes no token where tokens are searched greedily or sampled with the loop's own cache
OF_NO_MATTER = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.0,
    "low_memory": True,
    "use_cache": False,
    "cache_config": {"a": 1},
    "max_cache_len": 64,
    "prefill_chunk_size": 4,
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "decoder_start_token_id": 3,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "max_matching_ngram_size": 3,
    "speculation_type": "dflash",
    "return_dict_in_generate": False,
}
OF_THE_FILE = {"transformers_version", "_from_model_config", "_commit_hash", "continuous_batching_config"}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ours(llama):
    return SelfSpeculativeModel(llama, None, make_adapter(llama, K, lora_rank=2))


def generate(model, *, rows=1, **options):
    ids = torch.tensor([PROMPT] * rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a processor is slow, or a field of no use
        return model.generate(ids, **{"max_new_tokens": 12, **options})


def test_every_field_of_a_generation_config_is_thought_of():
    """A later version's new field is to be tried, and put where it belongs."""
    known = HONOURED.keys() | REFUSED.keys() | OF_NO_MATTER.keys() | OF_THE_FILE
    assert not set(vars(GenerationConfig())) - known


@pytest.mark.parametrize("field", HONOURED)
def test_what_decides_the_tokens_is_honoured(llama, ours, field):
    options = HONOURED[field]
    expected = generate(llama, **options)
    for mode in ("plain", "fused"):
        assert torch.equal(generate(llama, custom_generate=ours, mode=mode, **options), expected)


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_be_decoded_otherwise_is_refused(llama, ours, field):
    options, words = REFUSED[field]
    with pytest.raises(ValueError, match=words):
        generate(llama, custom_generate=ours, **options)


@pytest.mark.parametrize("field", OF_NO_MATTER)
def test_what_changes_no_token_is_let_through(llama, ours, field):
    options = {field: OF_NO_MATTER[field]}
    assert torch.equal(generate(llama, custom_generate=ours, **options), generate(llama))


@pytest.mark.parametrize("kind", ["dynamic", "static", "hybrid"])
def test_caches_that_hold_what_the_loops_own_holds_are_let_through(llama, ours, kind):
    assert torch.equal(generate(llama, custom_generate=ours, cache_implementation=kind), generate(llama))


@pytest.mark.parametrize("option", [{"encoder_no_repeat_ngram_size": 2}, {"encoder_repetition_penalty": 2.0}], ids=str)
def test_processors_that_tell_rows_apart_by_their_index_take_one_row(llama, ours, option):
    with pytest.raises(ValueError, match=r"expected one row with Encoder\w+, found 2"):
        generate(llama, custom_generate=ours, rows=2, **option)


@pytest.mark.parametrize("name", ["token_type_ids", "inputs_embeds", "labels"])
def test_inputs_of_another_kind_are_refused(llama, ours, name):
    ids = torch.tensor([PROMPT])
    values = {"inputs_embeds": torch.zeros(1, len(PROMPT), 32, dtype=torch.float64)}
    with pytest.raises(ValueError, match=name):
        ours(llama, ids, [], [], GenerationConfig(), **{name: values.get(name, ids)})


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([[], []], None, r"input_ids: expected at least one token in each row, found shape \[2, 0\]"),
        ([PROMPT, PROMPT], [[1] * 9, [0] * 9], "attention_mask: expected at least one token in each row, found a row"),
    ],
)
def test_a_row_without_a_token_is_refused(llama, ours, ids, mask, words):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=words):
        ours(llama, torch.tensor(ids).long(), [], [], GenerationConfig(), attention_mask=mask)


def test_transformers_keeps_a_streamer_to_itself(llama, ours):
    """It is handed to no callable, which is why there is `with_streamer`; when that changes, this fails."""

    class Collect:
        tokens: tuple[int, ...] = ()

        def put(self, value):
            self.tokens += tuple(value.flatten().tolist())

        def end(self):
            self.tokens += (-1,)

    streamer = Collect()
    generate(llama, custom_generate=ours, streamer=streamer)
    assert list(streamer.tokens) == PROMPT


class EndsAtNinths(StoppingCriteria):
    def __call__(self, input_ids, scores, **options):
        return torch.tensor([bool(row[-1] % 9 == 0) for row in input_ids])


@pytest.mark.parametrize("eos", [{}, {"eos_token_id": 99, "pad_token_id": 0}], ids=["no end", "an end"])
@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_rows_that_a_criterion_of_the_users_ends_go_on_or_are_padded_as_generate_has_it(mode, eos):
    """Where no id ends a text `generate` pads nothing: all go on until each has been ended."""
    model = tiny_model("qwen3-mixed-windows")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K, lora_rank=2, head_width=6))
    prompts = [[9, 8, 9, 8, 9, 8, 9], [5], [1, 2, 3, 1, 2, 3, 1, 2, 3], [7] * 5]
    ids = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    lengths = set()
    for rows in ([0, 1, 2, 3], [0, 2], [3, 0]):
        options = {"attention_mask": mask[rows], "max_new_tokens": 24, "do_sample": False, **eos}
        options["stopping_criteria"] = [EndsAtNinths()]
        expected = model.generate(ids[rows], **options)
        found = model.generate(ids[rows], custom_generate=partial(ours, mode=mode), **options)
        assert found.tolist() == expected.tolist()
        lengths.add(expected.shape[1])
    assert min(lengths) < 9 + 24  # criteria did end some
