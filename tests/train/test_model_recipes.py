"""Recipes for published models, on tiny models of the same class behind templates that behave as theirs do."""

import copy
import json
from pathlib import Path

import chat_templates
import generate_responses
import programs
import pytest
import torch
import train_adapter
from data_samples import CHAT, write_jsonl
from matrix.published_sizes import PUBLISHED
from matrix.tiny_configs import tiny_model

from pardec.adapters.files import METADATA_FILE
from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import load_recipe
from pardec.data.corpus import load_corpus
from pardec.data.responses.prompt_mix import PromptSource, draw_mix
from pardec.data.responses.response_file import append_rows, one_turn, response_row
from pardec.decoding.probing.probe import probe
from pardec.target.forward import TargetModel
from pardec.training.steps import part_of

RECIPES = Path(__file__).parents[2] / "recipes"
# recipe and model type -> template
MODELS = {
    ("qwen3", "qwen3"): chat_templates.QWEN3_LIKE,
    ("llama3", "llama"): chat_templates.LLAMA3_LIKE,
    ("smollm3", "smollm3"): chat_templates.SMOLLM3_LIKE,
    ("gemma3", "gemma3_text"): chat_templates.GEMMA3_LIKE,
    ("gemma3", "gemma3"): chat_templates.GEMMA3_LIKE,
    ("mistral_7b", "mistral"): chat_templates.MISTRAL_LIKE,
    ("phi4_mini", "phi3"): chat_templates.PHI4_LIKE,
    ("gpt_oss_20b", "gpt_oss"): chat_templates.HARMONY_LIKE,
}
SMALL = ("adapter.lora.r=2", "train.batch_size=2", "train.anchors_per_sequence=4", "data.max_length=160")


def tiny_base(family, vocab_size):
    """In float32, with as many embeddings as the tokenizer has tokens."""
    changes = {"text_config": {"vocab_size": vocab_size}} if family == "gemma3" else {"vocab_size": vocab_size}
    return tiny_model(family, dtype=torch.float32, **changes)


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "questions.jsonl", [{"question": f"What is {n} + {n}?"} for n in range(12)])


def answered(questions, tokenizer, path):
    """A file of responses to chat prompts of this tokenizer's template."""
    source = PromptSource("questions", questions)
    prompts, _ = draw_mix([source], tokenizer, num_prompts=8, prompt_tokens=120)
    answers = [tokenizer(f"It is {n}.", add_special_tokens=False).input_ids for n in range(8)]
    rows = zip(prompts, answers, strict=True)
    append_rows(path, [response_row(n, True, prompt, one_turn(answer)) for n, (prompt, answer) in enumerate(rows)])
    return path


def test_there_is_a_tiny_model_for_every_published_one():
    assert {model_type for model_type, _ in PUBLISHED.values()} == {family for _, family in MODELS}
    for name, family in MODELS:
        assert PUBLISHED[load_recipe(RECIPES / f"{name}.yaml", (), Recipe).base][0] in {
            f for n, f in MODELS if n == name
        }
        assert family


@pytest.mark.parametrize(("name", "family"), MODELS, ids=lambda one: one)
def test_every_part_of_the_adapter_learns_from_responses_and_conversations(
    name, family, questions, chat_tokenizer, tmp_path
):
    chat_tokenizer.chat_template = MODELS[name, family]
    base = tiny_base(family, len(chat_tokenizer))
    probe(TargetModel.wrap(base))
    talks = write_jsonl(tmp_path / "talks.jsonl", [{"messages": CHAT}] * 4)
    paths = (str(answered(questions, chat_tokenizer, tmp_path / "answers.jsonl")), talks)
    recipes = [load_recipe(RECIPES / f"{name}.yaml", (*SMALL, f"data.path={path}"), Recipe) for path in paths]
    module, _, _ = train_adapter.begin_module(recipes[0], base, None)
    for recipe in recipes:
        corpus = load_corpus(recipe.data.path, chat_tokenizer, max_length=recipe.data.max_length)
        batch = next(iter(train_adapter.make_loader(recipe, corpus, 0, recipe.train.batch_size)))
        loss, count, _ = module(**batch)
        assert torch.isfinite(loss)
        (loss / count).backward()
    learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
    moved = {part_of(n) for n, p in learned.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"mask_embeddings", "lora"}


@pytest.mark.parametrize(("name", "family"), [("qwen3", "qwen3"), ("gpt_oss_20b", "gpt_oss")], ids=lambda one: one)
def test_a_model_answers_questions_and_an_adapter_is_trained_on_its_answers(
    name, family, questions, tokenizer, tmp_path
):
    folder, answers, output = tmp_path / "base", tmp_path / "answers.jsonl", tmp_path / "adapter"
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = MODELS[name, family]
    tiny_base(family, len(chat)).save_pretrained(folder)
    chat.save_pretrained(folder)
    mix = f"data={{mix: [{{kind: questions, path: {questions}}}], follow_ups: 0.5}}"
    sizes = ("num_responses=6", "max_new_tokens=8", "prompt_tokens=100", "batch_size=6", f"output={answers}")
    ended = programs.run(generate_responses.main, RECIPES / "responses_smollm2.yaml", f"base={folder}", mix, *sizes)
    assert ended.code == 0, ended.err[-2000:]
    assert {json.loads(line)["kind"] for line in answers.read_text().splitlines()} == {"questions"}
    small = (*SMALL, "train.steps=1", "eval.num_prompts=1", "eval.max_new_tokens=4")
    paths = (f"base={folder}", f"data.path={answers}", f"output_dir={output}")
    ended = programs.run(train_adapter.main, RECIPES / f"{name}.yaml", *paths, *small)
    assert ended.code == 0, ended.err[-2000:]
    assert (output / METADATA_FILE).is_file()
