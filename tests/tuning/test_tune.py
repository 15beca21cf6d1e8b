"""`pardec tune` on the packaged model: what it prints, what it writes, and that loading uses it."""

import builtins
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from greedy_oracle import prompts as rows
from recorded_steps import rerun
from tiny_models import make_adapter, tiny_model
from tqdm import tqdm
from typer.testing import CliRunner

import pardec
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TUNED_FILE, TunedChoice, read_tuned, weights_of, write_tuned
from pardec.cli.program import app
from pardec.decoding.asking.messages import message_ids
from pardec.decoding.engine import Engine
from pardec.draft_tree import DraftTree
from pardec.layout import PLAIN
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name
from pardec.tuning import timing
from pardec.tuning import tune as tune_story
from pardec.tuning.choice import PLAIN_WAY, Way, tree_way, with_copies
from pardec.tuning.measuring import QUICK, Findings, measure
from pardec.tuning.report import _name, describe
from pardec.tuning.timing import in_turn
from pardec.tuning.tune import prompts_to_tune_on, tune

K = 2


@pytest.fixture(scope="module")
def saved(adapters):
    return adapters / "lora"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def main():", "import os", "class A:")))
    return str(path)


def run(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments])


def run_and_find(*arguments: str):
    """Runs it, and returns what it measured as well."""
    found: list[Findings] = []

    def measure_and_keep(*given):
        found.append(measure(*given))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_story, "measure", measure_and_keep)
        result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result, *found


@pytest.fixture(scope="module")
def tuned(saved, tmp_path_factory, prompts):
    """A folder that was tuned, with its picture beside it; the run of the command, and what it measured."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    shutil.copytree(saved, folder)
    picture = folder.parent / "new" / "cost.png"
    few = ("--quick", "--prompt-file", prompts, "--max-new-tokens", "6", "--picture", str(picture))
    return folder, picture, *run_and_find(str(folder), *few)


@pytest.fixture
def measured(tuned, monkeypatch):
    """Saves measuring again where it does not matter what was measured."""
    monkeypatch.setattr(tune_story, "measure", lambda *given: tuned[-1])


def test_quick_tuning_writes_what_it_chose_and_prints_a_table(tuned):
    folder, picture, result, _ = tuned
    text = " ".join(result.stdout.split())
    for words in ("3 prompts, 6 new tokens, batch 1, greedy", "plain", "prefill included", "without tuning: 2 2 2"):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    (choice,) = json.loads((folder / TUNED_FILE).read_text())["choices"]
    assert str(folder / TUNED_FILE) in result.stdout.replace("\n", "")
    assert len(choice["conditional_acceptance"]) == K
    # random mask tokens draft in vain, so nothing can be faster than plain decoding but by the clock's noise
    assert choice["measured_tokens_per_second"] >= choice["plain_tokens_per_second"]


def test_no_way_is_captured_while_ways_take_turns(tmp_path, monkeypatch):
    """Of more ways than a model keeps engines for, each would be timed with its capture."""
    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "recorder", rerun)
    made, original, under_the_clock = [], Engine.__init__, []

    def noted(self, *args, **options):
        made.append(self)
        original(self, *args, **options)

    def watched(run, keys, repetitions):
        before = len(made)
        calls = in_turn(run, keys, repetitions)
        under_the_clock.append((len({way for way, *_ in keys}), len(made) - before))
        return calls

    monkeypatch.setattr(Engine, "__init__", noted)
    monkeypatch.setattr(timing, "in_turn", watched)
    base = tiny_model("llama")
    model = SelfSpeculativeModel(base, None, make_adapter(base, 3, lora_rank=2, head_width=8))
    model.capture = True
    save_adapter(model.adapter, tmp_path)
    tune(model, tmp_path, rows(61, (5, 3)), max_new_tokens=4, effort=QUICK)
    assert max(num_ways for num_ways, _ in under_the_clock) > 8
    assert [num_made for _, num_made in under_the_clock] == [0, 0]


def test_a_prompt_that_is_too_long_is_named_with_its_file_before_anything_is_measured(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_story, "measure", None)
    long = tmp_path / "long.txt"  # a text is one prompt
    long.write_text("def main():\n    return 1\n" * 400)
    result = run(str(saved), "--quick", "--prompt-file", str(long))
    assert result.exit_code == 2
    assert f"{long}: prompt 1 of 1: prompt and new tokens: expected at most" in result.stderr


def test_standard_prompts_batches_and_json(saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    result = run(
        str(folder), "--quick", "--num-prompts", "3", "--batch-size", "2", "--max-new-tokens", "4",
        "--temperature", "0.8", "--top-k", "10", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_prompts"] == 2  # the third fills no batch
    assert found["choice"]["temperature"] == 0.8
    assert found["choice"]["batch_size"] == 2
    shapes = [tuple(one["block_lengths"]) for one in found["measured"]]
    assert {PLAIN, (2, 2, 2)} <= set(shapes)
    assert found["measured"][0]["measured_tokens_per_second"] == max(
        one["measured_tokens_per_second"] for one in found["measured"]
    )
    tuned = pardec.load(folder).tuned
    assert tuned is not None
    assert tuned.block_lengths == tuple(found["choice"]["block_lengths"])


def choice_for(folder, **choice) -> TunedChoice:
    """A choice for this device."""
    name = device_name(torch.device("cpu"))
    facts = (choice.pop("block_lengths"), weights_of(folder), 1.0, 2.0, 2.0, 1.0, [0.5, 0.5])
    return TunedChoice(name, choice.pop("dtype", "float32"), False, *facts, **choice)


def test_several_dtypes_are_tuned_compared_and_the_fastest_is_loaded(saved, tmp_path, prompts):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    with pytest.raises(ValueError, match=r"^dtype: expected dtypes that `pardec tune .* has compared .* found none in"):
        pardec.load(folder, dtype="tuned")
    few = ("--quick", "--prompt-file", prompts, "--num-prompts", "2", "--max-new-tokens", "4")
    result = run(str(folder), *few, "--dtype", "float32,float64", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["choice"]["dtype"] for one in found["reports"]] == ["float32", "float64"]
    assert found["by_dtype"].keys() == {"float32", "float64"}
    choices = json.loads((folder / TUNED_FILE).read_text())["choices"]
    assert [one["dtype"] for one in choices] == ["float32", "float64"]
    assert all(one["by_dtype"] == found["by_dtype"] for one in choices)
    fastest = max(found["by_dtype"], key=found["by_dtype"].get)
    assert str(pardec.load(folder, dtype="tuned").target.dtype) == f"torch.{fastest}"
    assert pardec.load(folder).target.dtype == torch.float32
    for speeds in ({"float32": 1.0, "float64": 2.0}, {"float32": 2.0, "float64": 1.0}):
        write_tuned(folder, choice_for(folder, block_lengths=PLAIN, by_dtype=speeds))
        model = pardec.load(folder, dtype="tuned")
        assert str(model.target.dtype) == f"torch.{max(speeds, key=speeds.get)}"


@pytest.mark.usefixtures("measured")
def test_the_table_of_several_dtypes_says_which_is_fastest(saved, tmp_path, prompts):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    few = ("--quick", "--prompt-file", prompts, "--num-prompts", "1", "--max-new-tokens", "3")
    result = run(str(folder), *few, "--dtype", "float32,float64")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "fastest dtype: float" in text
    assert "measured in turn; --dtype tuned uses it" in text
    assert "not tuned" not in text


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("has", [True, False])
def test_a_dtype_that_the_device_has_instructions_for_is_named(saved, tmp_path, prompts, monkeypatch, has):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    monkeypatch.setattr(tune_story, "has_bfloat16", lambda device: has)
    few = ("--quick", "--prompt-file", prompts, "--num-prompts", "1", "--max-new-tokens", "3")
    text = " ".join(run(str(folder), *few).stdout.split())
    assert ("not tuned: bfloat16" in text) is has
    assert ("--dtype float32,bfloat16 finds the fastest" in text) is has


def test_the_head_and_two_pass_are_measured_beside_fused_steps(packaged_adapter, tmp_path, prompts, monkeypatch):
    folder = tmp_path / "adapter"
    save_adapter(packaged_adapter(K, head_width=8), folder)
    few = ("--quick", "--prompt-file", prompts, "--num-prompts", "1", "--max-new-tokens", "6")
    result, measured = run_and_find(str(folder), *few, "--json")
    found = json.loads(result.stdout)
    kinds = {(one["mode"], one["use_head"]) for one in found["measured"]}
    assert kinds == {("plain", True), ("fused", True), ("fused", False), ("two_pass", True), ("two_pass", False)}
    assert found["ms_per_step_by_rows_without_head"]
    chosen = found["choice"]
    assert (chosen["mode"], chosen["use_head"]) in kinds
    monkeypatch.setattr(tune_story, "measure", lambda *given: measured)
    text = " ".join(run(str(folder), *few).stdout.split())
    for words in ("two_pass, K", ", no head", "chosen: "):
        assert words in text


def test_a_choice_in_words():
    facts = ("a", "b", False, (2, 2, 2), {}, 1.0, 1.0, 3.0, 2.0, [])
    tree = DraftTree((0, 0, 1), (0, 1, 0), (2, 1, 1, 1))
    words = [
        (TunedChoice(*facts), False, "K = 2, blocks 2 2 2, 9 rows, 1.50 x plain"),
        (TunedChoice(*facts), True, "K = 2, blocks 2 2 2, with the head, 9 rows, 1.50 x plain"),
        (
            replace(TunedChoice(*facts), block_lengths=(1, 1, 0, 0), copy_tokens=2),
            False,
            "K = 1, blocks 1 1 0 0, 2 copied tokens, 6 rows, 1.50 x plain",
        ),
        (
            replace(TunedChoice(*facts), block_lengths=(0, 0, 0), copy_tokens=2),
            True,
            "no drafts, as the adapter's do not pay here, 2 copied tokens, 3 rows, 1.50 x plain",
        ),
        (TunedChoice(*facts, mode="two_pass"), False, "K = 2, two_pass, 6 rows, 1.50 x plain"),
        (TunedChoice(*facts, use_head=False), True, "K = 2, blocks 2 2 2, without the head, 9 rows, 1.50 x plain"),
        (TunedChoice(*facts, tree=tree), True, "K = 2, a tree of 3 nodes, with the head, 9 rows, 1.50 x plain"),
        (
            TunedChoice(*facts, mode="two_pass", tree=tree),
            False,
            "K = 2, two_pass, a tree of 3 nodes, 7 rows, 1.50 x plain",
        ),
        (
            replace(TunedChoice(*facts, tree=tree), block_lengths=(2, 2, 2, 2, 2), copy_tokens=2),
            False,
            "K = 2, a tree of 3 nodes, 2 copied tokens, 2 drafts behind each, 15 rows, 1.50 x plain",
        ),
        (
            TunedChoice(*facts, mode="two_pass", tree=tree, copy_tokens=2),
            False,
            "K = 2, two_pass, a tree of 3 nodes, 2 copied tokens, 9 rows, 1.50 x plain",
        ),
    ]
    for choice, has_head, expected in words:
        assert describe(choice, has_head) == expected


def test_a_way_in_a_cell():
    tree = DraftTree((0, 0, 1), (0, 1, 0), (2, 1, 1, 1))
    for way, expected in (
        (PLAIN_WAY, "plain"),
        (with_copies(PLAIN_WAY, 3), "3 copies"),
        (Way("fused", (2, 1, 0), False), "2 1 0, no head"),
        (with_copies(Way("fused", (1, 1)), 3), "1 1 + 3 copies"),
        (with_copies(Way("fused", (1, 1)), 3, 1), "1 1 + 3 copies of 1"),
        (tree_way("fused", tree), "tree of 3, K 2"),
        (with_copies(tree_way("fused", tree), 3), "tree of 3, K 2 + 3 copies"),
        (with_copies(tree_way("fused", tree), 3, 2), "tree of 3, K 2 + 3 copies of 2"),
        (with_copies(tree_way("two_pass", tree, False), 3), "two_pass, tree of 3, K 2 + 3 copies, no head"),
    ):
        assert _name(way, has_head=True) == expected


def test_prompts_are_chats_where_they_say_so_or_are_asked_to_be(packaged_adapter, tiny_base, chat_tokenizer, tmp_path):
    model = SelfSpeculativeModel(tiny_base, chat_tokenizer, packaged_adapter(K))
    chat = message_ids([{"role": "user", "content": "Hello"}], chat_tokenizer)
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "chat", "turns": ["Hello", "Bye"]}) + "\n")
    assert prompts_to_tune_on(model, str(path), None) == chat
    path.write_text(json.dumps({"prompt": "Hello"}) + "\n")
    assert prompts_to_tune_on(model, str(path), None, as_chat=True) == chat
    assert prompts_to_tune_on(model, ["Hello"], None, as_chat=True) == chat
    as_text = [chat_tokenizer("Hello").input_ids]
    assert prompts_to_tune_on(model, str(path), None) == prompts_to_tune_on(model, ["Hello"], None) == as_text
    with pytest.raises(ValueError, match=r"^chat: expected prompts to render by the chat template"):
        prompts_to_tune_on(model, None, 1, as_chat=True)


def test_generation_uses_a_mode_and_a_head_that_were_chosen(packaged_adapter, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(packaged_adapter(K, head_width=8), folder)
    write_tuned(folder, choice_for(folder, block_lengths=(1, 1), mode="two_pass", use_head=False))
    engines = pardec.load(folder).engines
    two_pass = engines.drafting(None, None, None, None)
    assert (two_pass.mode, two_pass.block_lengths, two_pass.head) == ("two_pass", (1, 1), None)
    assert engines.drafting("two_pass", None, None, None) == two_pass
    assert engines.drafting(None, None, None, True).head is engines.head is not None
    # whoever asks for another mode or K gets it as if nothing had been tuned
    fused = engines.drafting("fused", None, None, None)
    assert (fused.mode, fused.block_lengths, fused.head) == ("fused", (2, 2, 2), engines.head)
    assert engines.drafting(None, 2, None, None) == fused
    assert engines.drafting("two_pass", 2, None, None).block_lengths == (2, 2, 2)
    assert engines.drafting("plain", None, None, None).mode == "plain"
    engines.choices = [choice_for(folder, block_lengths=PLAIN)]
    assert engines.drafting(None, None, None, None).mode == "plain"
    assert engines.drafting("fused", None, None, None) == fused


def test_generation_uses_the_choice_unless_told_otherwise(saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    model = pardec.load(folder)
    untuned = model.generate("def main():", max_new_tokens=8)
    assert untuned.stats.num_draft_tokens == K * untuned.stats.num_drafts
    write_tuned(folder, choice_for(folder, block_lengths=(1, 1)))
    tuned = pardec.load(folder)
    out = tuned.generate("def main():", max_new_tokens=8)
    assert out.stats.num_draft_tokens == out.stats.num_drafts > 0
    assert out.token_ids == untuned.token_ids
    told = tuned.generate("def main():", max_new_tokens=8, num_speculative_tokens=2)
    assert told.stats.num_draft_tokens == 2 * told.stats.num_drafts
    (folder / TUNED_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"tuned\.json: expected JSON, found"):
        pardec.load(folder)


@pytest.mark.usefixtures("measured")
def test_without_matplotlib_there_is_a_line_instead_of_a_picture(saved, tmp_path, prompts, monkeypatch):
    folder, imported = tmp_path / "adapter", builtins.__import__
    shutil.copytree(saved, folder)

    def without(name, *rest, **named):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    picture = tmp_path / "cost.png"
    few = ("--quick", "--prompt-file", prompts, "--num-prompts", "1", "--max-new-tokens", "3")
    result = run(str(folder), *few, "--picture", str(picture))
    assert result.exit_code == 0, result.output
    assert "no picture: No module named 'matplotlib'; pip install 'pardec[plots]'" in result.stdout.replace("\n", " ")
    assert not picture.exists()
    assert read_tuned(folder, "another device", "float32") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "5", "--num-prompts", "2"], "batch_size: expected 1 to 2, the number of prompts, found 5"),
        (["--num-prompts", "0"], "num_prompts: expected an integer >= 1, found 0"),
        (["--max-new-tokens", "1"], "max_new_tokens: expected at least 2, to time a step, found 1"),
        (["--temperature", "-1"], "temperature: expected"),
        (["--max-new-tokens", "2048"], "expected at most 2048 positions"),
        (["--prompt-file", "/nowhere"], "/nowhere: expected python-stdlib or a file of prompts, found nothing"),
        (["--dtype", "float31"], "dtype: expected a torch dtype"),
        (["--dtype", "float32,float31"], "dtype: expected a torch dtype"),
        (["--dtype", "tuned"], "dtype: expected dtypes that `pardec tune"),
        (["--chat"], "messages: expected a tokenizer with a chat template"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, prompts, arguments, words):
    result = run(str(saved), "--quick", "--prompt-file", prompts, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (saved / TUNED_FILE).exists()


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "expected an adapter directory with pardec.json" in result.stderr


def test_a_folder_that_cannot_be_written_to_is_refused_before_measuring(saved, prompts, monkeypatch):
    def refuse(directory):
        raise OSError(f"{directory}: expected an adapter folder that can be written to, found Read-only file system")

    monkeypatch.setattr(tune_story, "check_writable", refuse)
    monkeypatch.setattr(tune_story, "measure", lambda *args: pytest.fail("measured"))
    result = run(str(saved), "--quick", "--prompt-file", prompts)
    assert result.exit_code == 2
    assert "Read-only file system" in result.stderr


def test_a_model_without_adapter_or_tokenizer_is_refused(tiny_base, saved):
    bare = SelfSpeculativeModel(tiny_base, None, None)
    with pytest.raises(ValueError, match="expected one with an adapter, found none"):
        tune(bare, saved, [[1, 2]], effort=QUICK)
    with pytest.raises(ValueError, match="expected a tokenizer beside the model, found none"):
        prompts_to_tune_on(bare, None, 1)


def test_the_progress_bar_names_what_is_measured(saved, capsys):
    """Of a run that is quick because nothing is decoded."""
    model = pardec.load(saved)
    stats = SimpleNamespace(seconds=1.0)
    model.generate = lambda *_, **__: SimpleNamespace(stats=stats, token_ids=[[1, 2]], counts=[])  # type: ignore
    with tqdm(total=4, mininterval=0) as bar:
        decode = tune_story._decoding(model, [[[1]]], bar, 0.0, None, 0)
        for way in (Way("plain", (0,)), Way("two_pass", (2, 2, 2)), Way("fused", (0,) * 5, copy_tokens=4)):
            decode(way, 0, 2)
    told = capsys.readouterr().err
    for words in ("[00:00<?, ?it/s, plain]", "two_pass, K = 2]", "fused, 4 copied]"):
        assert words in told
