"""The public API: forms of input, refusals, loading, streaming, and the door from transformers' generate."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from greedy_oracle import plain_generate
from tiny_models import make_adapter, tiny_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import pardec
from pardec.adapters.adapter import AdapterError
from pardec.adapters.files import save_adapter
from pardec.decoding import prepack
from pardec.decoding.probing.probe import probe
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel, UnsupportedModelError

K = 3
ROWS = [[5, 9, 2, 7, 7, 1], [3, 8, 8], [4, 4, 6, 1, 2, 9, 3, 5, 11]]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ours(llama):
    return SelfSpeculativeModel(llama, None, make_adapter(llama, K, lora_rank=2))


@pytest.fixture
def saved(packaged_adapter, tmp_path):
    """An adapter directory for the packaged model."""
    save_adapter(packaged_adapter(K, lora_rank=2), tmp_path / "adapter")
    return tmp_path / "adapter"


# ---------------------------------------------------------------------- forms of input and output


def test_all_forms_of_prompts_mean_the_same(ours):
    expected = ours.generate([ROWS[0], ROWS[0]], max_new_tokens=8).token_ids
    assert ours.generate(ROWS[0], max_new_tokens=8).token_ids == expected[:1]
    assert ours.generate(torch.tensor(ROWS[0]), max_new_tokens=8).token_ids == expected[:1]
    assert ours.generate(torch.tensor([ROWS[0]] * 2), max_new_tokens=8).token_ids == expected
    assert ours.generate([ROWS[0]], max_new_tokens=8, num_return_sequences=2).token_ids == expected


def test_text_prompts_are_tokenised_and_answers_decoded(tiny_base, tokenizer):
    model = SelfSpeculativeModel(tiny_base, tokenizer, make_adapter(tiny_base, K))
    out = model.generate(["import os\n", "def f(x):"], max_new_tokens=12)
    ids = tokenizer("def f(x):").input_ids
    assert out.token_ids[1] == plain_generate(tiny_base, ids, 12)
    assert out.text[1] == tokenizer.decode(out.token_ids[1], skip_special_tokens=True)


def test_sequences_are_right_padded_prompts_and_continuations(ours):
    out = ours.generate(ROWS, max_new_tokens=4)
    assert out.prompt_lengths.tolist() == [len(row) for row in ROWS]
    for row, new, sequence in zip(ROWS, out.token_ids, out.sequences.tolist(), strict=True):
        assert sequence == row + new + [0] * (len(sequence) - len(row) - len(new))


def test_stats_agree_with_the_tokens(ours):
    out = ours.generate(ROWS, max_new_tokens=17)
    assert out.stats.num_new_tokens == sum(map(len, out.token_ids))
    assert out.stats.num_steps == sum(one.num_steps for one in out.stats.sequences)
    assert out.stats.num_forwards == out.stats.num_steps + len(ROWS)
    assert out.stats.mean_acceptance_length == pytest.approx(out.stats.tokens_per_forward)
    for one in out.stats.sequences:
        assert 1 + one.num_accepted_tokens + one.num_steps >= 17


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_stream_gives_what_generate_gives(tiny_base, tokenizer, mode):
    model = SelfSpeculativeModel(tiny_base, tokenizer, make_adapter(tiny_base, K))
    out = model.generate("class Änderung:\n", max_new_tokens=40, mode=mode)
    chunks = list(model.stream("class Änderung:\n", max_new_tokens=40, mode=mode))
    assert [t for chunk in chunks for t in chunk.token_ids] == out.token_ids[0]
    assert "".join(chunk.text for chunk in chunks) == out.text[0]
    assert sum(chunk.num_accepted_tokens for chunk in chunks) <= out.stats.num_accepted_tokens


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_a_stream_returns_what_generate_does_and_the_caller_costs_no_time(ours, monkeypatch, mode):
    out, now = ours.generate(ROWS[0], max_new_tokens=10, mode=mode), [0.0]
    monkeypatch.setattr("pardec.model.time.perf_counter", lambda: now[0])
    chunks = ours.stream(ROWS[0], max_new_tokens=10, mode=mode)
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            returned = end.value
            break
        now[0] += 1.0
    assert (returned.token_ids, returned.text, returned.counts) == (out.token_ids, out.text, out.counts)
    assert torch.equal(returned.sequences, out.sequences)
    assert returned.stats.seconds == 0.0


def test_an_abandoned_stream_leaves_the_base_clean(llama, ours):
    stream = ours.stream(ROWS[0], max_new_tokens=20)
    next(stream)
    assert torch.is_grad_enabled()  # the caller's own code keeps its gradients
    logits = llama(torch.tensor([ROWS[0]])).logits  # between two steps the base is the base
    stream.close()
    assert not any(module._forward_hooks for module in llama.modules())
    assert torch.equal(logits, llama(torch.tensor([ROWS[0]])).logits)


def test_zero_drafts_is_plain_decoding(ours):
    assert ours.generate(ROWS, max_new_tokens=6, num_speculative_tokens=0).stats.num_drafts == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature: expected .* found -1"),
        ({"temperature": float("nan")}, "temperature: expected .* found nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p: expected a number in \(0, 1\], found 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p: expected a number in \(0, 1\], found 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected an integer >= 1, found 0"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p: expected .* found 2"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, found 0"),
        ({"num_speculative_tokens": K + 1}, f"expected at most {K}.*found {K + 1}"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens: expected an integer from 0 to 64, found -1"),
        ({"mode": "tree"}, "mode: expected one of plain, two_pass, fused, found 'tree'"),
        ({"max_new_tokens": 300}, r"expected at most 256 positions of the model, found 6 \+ 300 = 306"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected .* found 0"),
    ],
)
def test_options_out_of_range_are_refused(ours, options, words):
    with pytest.raises(ValueError, match=words):
        ours.generate([ROWS[0]], **options)
    if "num_return_sequences" not in options:
        with pytest.raises(ValueError, match=words):
            list(ours.stream(ROWS[0], **options))


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "at least one prompt, found none"),
        ([[]], "prompt 0: expected at least one token, found an empty prompt"),
        ([[1, 2], [61]], r"prompt 1: expected token ids in 0..60, found 61..61"),
        ([[-1]], "expected token ids in 0..60"),
        ("text", "expected token ids, as the base has no tokenizer"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(ours, prompts, words):
    with pytest.raises(ValueError, match=words):
        ours.generate(prompts, max_new_tokens=4)


def test_shared_mask_embeddings_draft_any_number_of_tokens(llama):
    model = SelfSpeculativeModel(llama, None, make_adapter(llama, 2, mask_sharing="shared"))
    expected = plain_generate(llama, ROWS[0], 20)
    assert model.generate([ROWS[0]], max_new_tokens=20, num_speculative_tokens=6).token_ids == [expected]


# ---------------------------------------------------------------------- loading


def test_load_finds_the_packaged_base_and_generates(saved, tiny_base):
    model = pardec.load(saved)
    assert model.base_model.dtype == torch.float32
    prompt = [17, 300, 25, 4]
    expected = plain_generate(tiny_base, prompt, 10)
    assert model.generate(prompt, max_new_tokens=10).token_ids == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_of_the_base_in_another_dtype_loads(saved, dtype):
    model = pardec.load(saved, dtype=dtype)
    assert model.generate([1, 2, 3], max_new_tokens=4).stats.num_new_tokens == 4


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_warned_of(saved, monkeypatch, has, recwarn):
    monkeypatch.setattr("pardec.loading.has_bfloat16", lambda device: has)
    pardec.load(saved)
    assert not recwarn
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        pardec.load(saved, dtype="bfloat16")
    told = [str(one.message) for one in recwarn]
    warning = "dtype: expected a CPU with instructions for bfloat16, found none: it is slow here"
    assert told == ([] if has else [warning])


def test_a_float16_copy_of_a_float32_base_loads_and_a_finetuned_one_does_not(llama, tmp_path):
    base = tiny_model("llama", dtype=torch.float32)
    save_adapter(make_adapter(base, K), tmp_path / "a")
    pardec.load(tmp_path / "a", base=tiny_model("llama", dtype=torch.float32).half())
    tuned = tiny_model("llama", dtype=torch.float32)
    tuned.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(AdapterError, match="input embeddings: expected sha256"):
        pardec.load(tmp_path / "a", base=tuned.half())


def test_another_base_is_refused_naming_what_differs(saved, llama):
    with pytest.raises(AdapterError, match=r"another base \(tiny-python\).*hidden_size: expected 256, found 32"):
        pardec.load(saved, base=llama)


def test_a_base_that_does_not_exist_is_refused_in_one_line(saved):
    with pytest.raises(ValueError, match="base '/nowhere/at/all': expected a folder or hub name"):
        pardec.load(saved, base="/nowhere/at/all")


def test_a_base_of_the_users_own_folder_loads(saved, tiny_base, tokenizer, tmp_path):
    tiny_base.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    assert pardec.load(saved, base=str(tmp_path / "mine")).tokenizer is not None


def test_flash_attention_is_refused_as_it_takes_no_mask(llama):
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"attention implementation 'flash_attention_2'.*sdpa, eager"):
        SelfSpeculativeModel(model, None, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FalconForCausalLM(FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, alibi=True)), "alibi"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)), "bloom"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2)),
            "linear_attention keep state"),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=32, d_ff=32, num_layers=1, d_kv=8,
            num_heads=4)), "encoder-decoder"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_exact_are_refused(make, words):
    from pardec.target.base import refuse_by_config

    def refuse(model):
        refuse_by_config(model.config)
        probe(TargetModel.wrap(model))

    model = make().eval()
    with pytest.raises(UnsupportedModelError, match=words):
        refuse(model)


def test_recurrent_layers_are_refused():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"])  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="layers of kind conv"):
        TargetModel.wrap(Lfm2ForCausalLM(config).eval())


def test_the_probe_notices_rows_that_leak(llama, monkeypatch):
    """A layout whose real rows see a mask row must not pass."""
    from pardec.decoding import plans
    from pardec.layout import RowLayout, chain_layout

    def leaking(block_lengths) -> RowLayout:
        layout = chain_layout(block_lengths)
        layout.visible[1, len(block_lengths)] = True
        return layout

    monkeypatch.setattr(plans, "chain_layout", leaking)
    with pytest.raises(UnsupportedModelError, match="expected rows of a step that are those of a plain forward"):
        probe(TargetModel.wrap(llama))


def test_switching_rope_is_held_below_the_switch():
    model = tiny_model(
        "llama",
        max_position_embeddings=256,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 24},
    )  # fmt: skip
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    with pytest.raises(ValueError, match="expected at most 24 positions"):
        ours.generate([ROWS[0]], max_new_tokens=19)
    expected = plain_generate(model, ROWS[0], 18)
    assert ours.generate([ROWS[0]], max_new_tokens=18).token_ids == [expected]


def test_longrope_stays_on_its_side_of_the_switch():
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = tiny_model(
        "qwen3",
        max_position_embeddings=256,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 24, **factors},
    )  # fmt: skip
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    expected = plain_generate(model, ROWS[0], 18)
    for mode in ("plain", "two_pass", "fused"):
        assert ours.generate([ROWS[0]], max_new_tokens=18, mode=mode).token_ids == [expected]


def test_two_open_streams_of_one_model_do_not_disturb_each_other(ours):
    alone = [c.token_ids for c in ours.stream(ROWS[0], max_new_tokens=20, temperature=1.0, seed=3)]
    first = ours.stream(ROWS[0], max_new_tokens=20, temperature=1.0, seed=3)
    second = ours.stream(ROWS[1], max_new_tokens=20, temperature=1.0, seed=4)
    found = []
    for chunk in first:
        found.append(chunk.token_ids)
        next(second, None)
    assert found == alone


def test_a_base_in_training_mode_is_refused(saved, tiny_base, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    save_adapter(make_adapter(model, K), tmp_path / "a")
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        pardec.load(tmp_path / "a", base=model.train())
    assert model.training


def test_a_conversation_given_as_prompts_is_pointed_to_messages(ours):
    with pytest.raises(ValueError, match=r"prompt 0: expected text or .* \(conversations go to messages=\)"):
        ours.generate([{"role": "user", "content": "hi"}], max_new_tokens=2)


@pytest.mark.parametrize("prompts", [{"input_ids": [1]}, [1.5, 2.5], [[True, False]], torch.tensor([[0.5]]), [None]])
def test_prompts_of_other_types_are_refused(ours, prompts):
    with pytest.raises(ValueError, match=r"expected text"):
        ours.generate(prompts, max_new_tokens=4)


# ---------------------------------------------------------------------- the transformers door


def test_door_gives_what_generate_gives_for_left_padded_batches(llama, ours):
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    for eos in (None, plain_generate(llama, ROWS[0], 5)[4]):
        options |= {"eos_token_id": eos, "pad_token_id": 0}
        expected = llama.generate(ids, **options)
        for mode in ("plain", "two_pass", "fused"):
            assert torch.equal(llama.generate(ids, custom_generate=ours, mode=mode, **options), expected)


def test_door_honours_processors_and_criteria(llama, ours):
    ids = torch.tensor([ROWS[0]])

    class StopAfterTwice(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([(row == row[-1]).sum() >= 3 for row in input_ids])

    for options in (
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": plain_generate(llama, ROWS[0], 3)[2], "pad_token_id": 0},
        {"stopping_criteria": StoppingCriteriaList([StopAfterTwice()])},
    ):
        expected = llama.generate(ids, max_new_tokens=16, do_sample=False, **options)
        for mode in ("plain", "two_pass", "fused"):
            if "stopping_criteria" in options:
                found = llama.generate(
                    ids, max_new_tokens=16, do_sample=False, custom_generate=ours, mode=mode, **options
                )
            else:
                with pytest.warns(UserWarning, match="called row by row on the host"):
                    found = llama.generate(
                        ids, max_new_tokens=16, do_sample=False, custom_generate=ours, mode=mode, **options
                    )
            assert torch.equal(found, expected), (options, mode)


def test_door_gives_processors_each_rows_unpadded_prefix(llama, ours):
    expected = [plain_generate(llama, row, 12, repetition_penalty=1.7) for row in ROWS]
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = (torch.arange(width) >= width - torch.tensor([[len(row)] for row in ROWS])).long()
    with pytest.warns(UserWarning, match="row by row"):
        found = llama.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False,
            repetition_penalty=1.7, custom_generate=ours)  # fmt: skip
    assert found[:, width:].tolist() == expected
    with pytest.raises(ValueError, match="MinLengthLogitsProcessor, which counts padding"):
        llama.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, min_new_tokens=3,
            eos_token_id=1, pad_token_id=0, custom_generate=ours)  # fmt: skip


def test_door_samples_with_transformers_own_seed(llama, ours):
    ids = torch.tensor([ROWS[0]] * 4)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 5, "custom_generate": ours}
    torch.manual_seed(0)
    first = llama.generate(ids, **options)
    torch.manual_seed(0)
    assert torch.equal(first, llama.generate(ids, **options))
    assert len({tuple(row) for row in first.tolist()}) > 1


def test_door_streams_and_returns_dicts(llama, ours):
    class Collect:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Collect(), torch.tensor([ROWS[0]])
    out = llama.generate(ids, max_new_tokens=9, do_sample=False, custom_generate=ours.with_streamer(streamer),
        return_dict_in_generate=True)  # fmt: skip
    assert streamer.tokens == out.sequences[0].tolist()
    assert streamer.ended
    assert out.sequences[0, len(ROWS[0]) :].tolist() == plain_generate(llama, ROWS[0], 9)


def test_door_refuses_what_it_cannot_do(llama, ours):
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(ValueError, match="greedy search or sampling, found beam_search by num_beams=3"):
        llama.generate(ids, max_new_tokens=4, num_beams=3, custom_generate=ours)
    with pytest.raises(ValueError, match="output_scores=False"):
        llama.generate(ids, max_new_tokens=4, output_scores=True, return_dict_in_generate=True, custom_generate=ours)
    with pytest.raises(ValueError, match="another model"):
        tiny_model("llama", seed=4).generate(ids, max_new_tokens=4, custom_generate=ours)
    with pytest.raises(ValueError, match="position_ids that count"):
        llama.generate(ids, max_new_tokens=4, position_ids=torch.arange(6)[None] + 3, custom_generate=ours)
    with pytest.raises(ValueError, match="one row with PrefixConstrainedLogitsProcessor, found 2"):
        llama.generate(ids.repeat(2, 1), max_new_tokens=4, custom_generate=ours,
            prefix_allowed_tokens_fn=lambda batch_id, row: [1 + batch_id])  # fmt: skip
    with pytest.raises(ValueError, match="processors without state, found UnbatchedClassifierFree"):
        llama.generate(ids, max_new_tokens=4, guidance_scale=1.5, custom_generate=ours)
    cache = llama(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="empty cache, found one of 6 tokens"):
        llama.generate(torch.tensor([[*ROWS[0], 3]]), past_key_values=cache, max_new_tokens=4, custom_generate=ours)
    holes = torch.tensor([[1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding on the left only"):
        llama.generate(ids, attention_mask=holes, max_new_tokens=4, custom_generate=ours)


def test_custom_processor_of_the_users_own_is_honoured(llama, ours):
    class Never(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, input_ids[0, -1]] = -float("inf")
            return scores

    from transformers import LogitsProcessorList

    ids = torch.tensor([ROWS[2]])
    options = {"max_new_tokens": 12, "do_sample": False, "logits_processor": LogitsProcessorList([Never()])}
    expected = llama.generate(ids, **options)
    with pytest.warns(UserWarning, match="called row by row on the host.*: Never"):
        assert torch.equal(llama.generate(ids, custom_generate=ours, **options), expected)


def test_no_files_but_safetensors_json_and_markdown_are_written(saved):
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".md"}
    shutil.rmtree(saved)


def test_an_attention_that_the_base_or_the_decoder_refuses_is_answered_with_those_it_takes(tmp_path):
    from pardec.target.base import load_base

    tiny_model("gemma2-eager", dtype=torch.float32).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), device="cpu", attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation: expected one of sdpa, eager, found 'flex_attention'"):
        load_base(str(tmp_path), device="cpu", attn_implementation="flex_attention")
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = GptOssConfig(vocab_size=61, **sizes, **heads)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "sinks")
    with pytest.raises(ValueError, match="expected eager, the one that gpt_oss models take, found 'sdpa'"):
        load_base(str(tmp_path / "sinks"), device="cpu", attn_implementation="sdpa")


def test_a_cache_that_does_not_fit_is_refused_with_what_would(llama, monkeypatch):
    import psutil

    class Short:
        available = 40_000

    ours = SelfSpeculativeModel(llama, None, make_adapter(llama, K))
    ours.generate([ROWS[0]], max_new_tokens=2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Short)
    with pytest.raises(ValueError, match=r"cache: expected at most 0\.00 GiB, free on cpu, found .* would fit"):
        ours.generate([ROWS[0]], max_new_tokens=60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("head_width", [0, 4])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_a_base_that_is_converted_later_is_followed(as_on_cuda, head_width, dtype, monkeypatch):
    if as_on_cuda:
        monkeypatch.setattr(prepack, "_keeps_form", lambda weight: True)
        monkeypatch.setattr(prepack, "_has_kernels", lambda dtype: True)
    base = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(base, None, make_adapter(base, 3, lora_rank=2, head_width=head_width))
    ours.generate([[5, 9, 2]], max_new_tokens=4)
    base.to(dtype)
    plain = ours.generate([[5, 9, 2]], max_new_tokens=12, mode="plain")
    assert ours.generate([[5, 9, 2]], max_new_tokens=12).token_ids == plain.token_ids


def test_completion_shows_public_names_before_they_are_used():
    program = "import pardec, sys; print(set(pardec.__all__) - set(dir(pardec)), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["set()", "False"]


def test_attention_that_is_switched_behind_the_back_is_refused_and_taken_again_when_it_is_back():
    base = tiny_model("llama")
    ours, prompts = SelfSpeculativeModel(base, None, make_adapter(base, 2)), [[5, 9, 2, 7, 5], [3]]
    expected = [plain_generate(base, prompt, 8) for prompt in prompts]
    assert ours.generate(prompts, max_new_tokens=8).token_ids == expected
    base.set_attn_implementation("eager")  # whose masks are numbers: those of sdpa would let everything be seen
    words = r"^base: expected attention 'sdpa', as when it was loaded, found 'eager'"
    for call in (lambda: ours.generate(prompts, mode="plain"), lambda: ours.stream(prompts[0])):
        with pytest.raises(ValueError, match=words):
            call()
    anew = SelfSpeculativeModel(base, None, make_adapter(base, 2))
    assert anew.generate(prompts, max_new_tokens=8).token_ids == expected
    base.set_attn_implementation("sdpa")
    assert ours.generate(prompts, max_new_tokens=8).token_ids == expected
