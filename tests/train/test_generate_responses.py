"""train/generate_responses.py: what a run writes, what it is continued from, and what it refuses."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import generate_responses
import programs
import pytest
import torch
import yaml
from launched import Launched, program
from safetensors.torch import load_file, save_file

from pardec.data.corpus import load_corpus
from pardec.data.python_sources import split_of
from pardec.data.responses.response_file import about_file, only_writer, plan_batches
from pardec.target.base import load_base, resolve_base

PROMPT_TOKENS, MAX_NEW_TOKENS, TOP_K = 16, 8, 5


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for n in range(20):
        name = chr(ord("a") + n) * 3  # stands in any 16 tokens of this file, and in no other
        text = "".join(f"def {name}_{i}({name}):\n    return {name} + {i}\n\n\n" for i in range(6))
        (folder / f"m{n:02}.py").write_text(text)
    return folder


def recipe_values(texts: Path, output: Path) -> dict:
    return {
        "base": "tiny-python",
        "output": str(output),
        "data": {"path": str(texts)},
        "num_responses": 13,
        "prompt_tokens": PROMPT_TOKENS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "top_k": TOP_K,
        "greedy_fraction": 0.3,
        "batch_size": 4,
    }


def command_line(texts: Path, output: Path, *overrides: str) -> list[str]:
    recipe = texts.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(texts, output)))
    return [str(recipe), *overrides]


def run(texts: Path, output: Path, *overrides: str) -> str:
    """What a run that ends well says."""
    ended = programs.run(generate_responses.main, *command_line(texts, output, *overrides))
    assert ended.code == 0, ended.err[-2000:]
    return ended.out


def refusal(texts: Path, output: Path, *overrides: str) -> str:
    return programs.run(generate_responses.main, *command_line(texts, output, *overrides)).error


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> Path:
    """The file that an uninterrupted run leaves."""
    output = tmp_path_factory.mktemp("finished") / "new" / "responses.jsonl"
    run(texts, output)
    return output


@pytest.fixture(scope="module")
def rows(finished) -> list[dict]:
    return [json.loads(line) for line in finished.read_text().splitlines()]


def parts(row: dict) -> tuple[list[int], list[int]]:
    """(prompt, response)."""
    P = row["loss_mask"].index(1)
    assert row["loss_mask"] == [0] * P + [1] * (len(row["input_ids"]) - P)
    return row["input_ids"][:P], row["input_ids"][P:]


# ---------------------------------------------------------------------- what is written


def test_rows_are_numbered_and_the_share_of_greedy_ones_is_the_recipes(rows):
    assert [row["index"] for row in rows] == list(range(13))
    assert sum(row["greedy"] for row in rows) == 4
    assert all(len(parts(row)[0]) == PROMPT_TOKENS and len(parts(row)[1]) <= MAX_NEW_TOKENS for row in rows)


def test_greedy_responses_are_those_of_generate(rows, tiny_base):
    same: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        prompt, response = parts(row)
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
        expected = tiny_base.generate(ids, **options)[0, len(prompt) :].tolist()
        same[row["greedy"]].append(response == expected)
    assert all(same[True])
    assert sum(same[False]) < len(same[False]) / 2  # one that was drawn may be the likeliest as well


def test_sampled_responses_are_the_models_own_but_not_its_likeliest(rows, tiny_base):
    """Every token is among the k likeliest at its place, and not all are the likeliest."""
    ranks = []
    for row in (row for row in rows if not row["greedy"]):
        prompt, response = parts(row)
        with torch.no_grad():
            logits = tiny_base(torch.tensor([row["input_ids"]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(response)[:, None])
        ranks += (logits > chosen).sum(dim=1).tolist()
    assert max(ranks) < TOP_K
    assert sum(rank > 0 for rank in ranks) > len(ranks) / 10


def test_no_prompt_is_of_what_training_holds_out(texts, rows, tokenizer):
    files = [file.read_text() for file in sorted(texts.iterdir())]
    held_out = load_corpus(str(texts), tokenizer, max_length=32).validation
    assert [tokenizer.decode(document.input_ids[1:]) for document in held_out] == [files[0]]
    for row in rows:
        prompt = tokenizer.decode(parts(row)[0]).removeprefix("<|endoftext|>")
        assert [n for n, text in enumerate(files) if prompt in text][:1] > [0]


def test_prompts_of_python_sources_are_of_the_training_split(tmp_path, monkeypatch, tokenizer):
    folder = tmp_path / "library"
    folder.mkdir()
    for n in range(300):
        (folder / f"m{n}.py").write_text(f"# {split_of(f'm{n}.py')}\n" * 60)
    monkeypatch.setattr("pardec.data.python_sources.stdlib_folder", lambda: folder)
    output = tmp_path / "responses.jsonl"
    run(folder, output, "data.path=python-stdlib", "max_new_tokens=1", "num_responses=200", "batch_size=200")
    prompts = [tokenizer.decode(parts(json.loads(line))[0]) for line in output.read_text().splitlines()]
    assert all("train" in prompt for prompt in prompts)
    assert not any("test" in prompt or "validation" in prompt for prompt in prompts)
    assert {split_of(f"m{n}.py") for n in range(300)} == {"train", "validation", "test"}


def test_training_reads_the_file_and_learns_the_responses(finished, rows, tokenizer):
    corpus = load_corpus(str(finished), tokenizer, max_length=PROMPT_TOKENS + MAX_NEW_TOKENS)
    found = {tuple(d.input_ids.tolist()): d.loss_mask.tolist() for d in (*corpus.train, *corpus.validation)}
    assert found == {tuple(row["input_ids"]): list(map(bool, row["loss_mask"])) for row in rows}


def test_what_the_rows_were_made_by_stands_beside_them(finished, rows):
    about = json.loads(about_file(finished).read_text())
    own = sum(sum(row["loss_mask"]) for row in rows)
    assert about["recipe"]["top_k"] == TOP_K
    assert about["command"].startswith("generate_responses.py ")
    assert set(about["versions"]) > {"torch", "transformers", "pardec"}
    assert about["counts"] == {
        "responses": 13, "greedy": 4, "short": 0, "prompt_tokens": 13 * PROMPT_TOKENS, "response_tokens": own,
    }  # fmt: skip
    assert about["last_run"]["tokens"] == own
    assert about["last_run"]["tokens_per_second"] == pytest.approx(own / about["last_run"]["seconds"])


# ---------------------------------------------------------------------- continuing


def test_a_finished_file_is_left_alone(finished, texts):
    before = {file: file.stat().st_mtime_ns for file in finished.parent.iterdir()}
    assert "already holds all 13 responses" in run(texts, finished)
    assert {file: file.stat().st_mtime_ns for file in finished.parent.iterdir()} == before


def test_a_second_run_to_one_file_is_refused_while_the_first_writes(finished, texts, tmp_path):
    output = tmp_path / "responses.jsonl"
    with only_writer(output):
        assert f"{output}: expected no other run that writes there, found one" in refusal(texts, output)
        assert output.read_bytes() == b""
    run(texts, output)
    assert output.read_bytes() == finished.read_bytes()


def begun(finished: Path, output: Path, num_bytes: int) -> Path:
    """What a run that was killed has left."""
    about = json.loads(about_file(finished).read_text())
    unfinished = {key: about[key] for key in about if key not in ("counts", "last_run", "num_bytes")}
    about_file(output).write_text(json.dumps(unfinished))
    output.write_bytes(finished.read_bytes()[:num_bytes])
    return output


@pytest.mark.parametrize("place", ["first row", "between batches", "inside a batch", "last row", "after the last row"])
def test_a_run_that_was_cut_off_continues_to_the_same_bytes(place, finished, texts, tmp_path):
    lines = finished.read_bytes().splitlines(keepends=True)
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    cuts = {
        "first row": (20, 0),
        "between batches": (ends[8], 8),
        "inside a batch": (ends[6] + 9, 4),
        "last row": (ends[13] - 1, 12),
        "after the last row": (ends[13], 13),
    }
    num_bytes, first = cuts[place]
    output = begun(finished, tmp_path / "cut.jsonl", num_bytes)
    said = run(texts, output)
    assert output.read_bytes() == finished.read_bytes()
    assert (f"at response {first}" in said) == (first > 0)
    about = json.loads(about_file(output).read_text())
    assert about["counts"] == json.loads(about_file(finished).read_text())["counts"]
    assert about["last_run"]["first_response"] == first
    assert "already holds" in run(texts, output)


def killed_within_a_row(*arguments: str) -> None:
    append_rows = generate_responses.append_rows

    def append_or_die(file: Path, rows: list[dict]) -> None:
        if rows[0]["index"] == 8:
            with file.open("ab", buffering=0) as begun:
                begun.write(b'{"index":8,"gre')
            os.kill(os.getpid(), signal.SIGKILL)
        append_rows(file, rows)

    generate_responses.append_rows = append_or_die
    program("generate_responses", *arguments)


def test_what_one_process_was_killed_at_in_the_middle_of_a_row_two_continue_to_the_same_bytes(
    finished, texts, tmp_path
):
    """13 responses in 5 batches, of which one is written: a process has none to generate in some round."""
    output = tmp_path / "killed.jsonl"
    arguments = command_line(texts, output)
    assert Launched(1, killed_within_a_row, *arguments).codes() == [-signal.SIGKILL]
    assert output.read_bytes().endswith(b'\n{"index":8,"gre')
    done = Launched(2, program, "generate_responses", *arguments).results()
    assert [one.code for one in done] == [0, 0], done[0].err[-2000:]
    assert output.read_bytes() == finished.read_bytes()
    assert "".join(one.out for one in done).count("at response 8") == 1
    about = json.loads(about_file(output).read_text())
    assert (about["num_processes"], [one["num_processes"] for one in about["earlier_runs"]]) == (2, [1])


def test_a_full_disk_ends_with_one_line_and_whole_batches(texts, tmp_path):
    output, options = tmp_path / "full.jsonl", ("num_responses=60", "max_new_tokens=2", "batch_size=8")
    run(texts, tmp_path / "whole.jsonl", *options)
    content = (tmp_path / "whole.jsonl").read_bytes()
    room = 5000  # more than what is told beside the rows takes
    assert 2 * about_file(tmp_path / "whole.jsonl").stat().st_size > room < len(content)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        message = refusal(texts, output, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"error: {output}: expected room for 8 more responses, found: File too large; ")
    left = output.read_bytes()
    assert content.startswith(left)
    assert left.endswith(b"\n")
    assert left.count(b"\n") in {batch.first for batch in plan_batches(60, 8, 0.3)[1:]}
    run(texts, output, *options)
    assert output.read_bytes() == content


# ---------------------------------------------------------------------- other bases, an adapter


@pytest.fixture(scope="module")
def other_base(tmp_path_factory) -> Path:
    """The packaged model with a chat template, for which a line break ends a text."""
    folder = tmp_path_factory.mktemp("base") / "chat"
    shutil.copytree(resolve_base("tiny-python"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# assistant: "
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [0, 199]}))
    return folder


def test_answers_end_with_their_eos_and_even_very_short_ones_are_read_by_training(other_base, tmp_path, tokenizer):
    assert tokenizer.decode([199]) == "\n"
    talks = [
        {"messages": [{"role": "user", "content": f"return {n}"}, {"role": "assistant", "content": "x"}]}
        for n in range(30)
    ]
    data, output = tmp_path / "talk.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in talks))
    run(
        tmp_path / "recipe",
        output,
        f"base={other_base}",
        f"data.path={data}",
        "max_new_tokens=24",
        "temperature=1.5",
        "seed=1",
    )
    answers = [parts(json.loads(line)) for line in output.read_text().splitlines()]
    asked = {f"# user: return {n}\n# assistant: " for n in range(30) if n % 20}
    assert len(answers) == 13
    assert {tokenizer.decode(prompt) for prompt, _ in answers} < asked
    for _, answer in answers:
        assert 0 < len(answer) <= 24
        assert not {0, 199} & set(answer[:-1])
        assert len(answer) == 24 or answer[-1] in (0, 199)
    short = sum(len(answer) < 3 for _, answer in answers)
    assert short > 0
    assert json.loads(about_file(output).read_text())["counts"]["short"] == short
    corpus = load_corpus(str(output), tokenizer, max_length=64)
    # an answer of one token is the bonus token of the prefill: there is no draft to learn
    drafted = sum(len(answer) > 1 for _, answer in answers)
    (only_validation,) = corpus.validation
    assert len(corpus.train) + (only_validation.loss_mask.sum() > 1) == drafted


def test_an_adapter_drafts_what_the_base_writes_anyway(texts, adapters, tmp_path, rows):
    """A random adapter, whose drafts are rejected: greedy responses are the same, sampled ones of the same law."""
    output = tmp_path / "responses.jsonl"
    run(texts, output, f"adapter={adapters / 'lora'}")
    drafted = [json.loads(line) for line in output.read_text().splitlines()]
    assert [parts(row)[0] for row in drafted] == [parts(row)[0] for row in rows]
    assert [row for row in drafted if row["greedy"]] == [row for row in rows if row["greedy"]]
    assert [row for row in drafted if not row["greedy"]] != [row for row in rows if not row["greedy"]]


# ---------------------------------------------------------------------- mixes of chat prompts


@pytest.fixture(scope="module")
def mix(other_base, texts) -> tuple[str, ...]:
    """What makes the recipe one of a mix."""
    questions = texts.parent / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"What is {n} + {n}?"}) + "\n" for n in range(30)))
    sources = f"[{{kind: questions, path: {questions}, weight: 2}}, {{kind: code, path: python-stdlib}}]"
    return (f"base={other_base}", f"data={{mix: {sources}, follow_ups: 0.5}}", "prompt_tokens=120", "num_responses=12")


@pytest.fixture(scope="module")
def mixed(mix, texts, tmp_path_factory) -> tuple[Path, str]:
    """The file that a run of a mix leaves, and what it says."""
    output = tmp_path_factory.mktemp("mixed") / "responses.jsonl"
    return output, run(texts, output, *mix)


def test_rows_of_a_mix_name_their_kind_and_are_told_by_it(mixed):
    output, said = mixed
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [sum(row["kind"] == kind for row in rows) for kind in ("questions", "code")] == [8, 4]
    about = json.loads(about_file(output).read_text())
    assert (about["counts"]["questions"], about["counts"]["code"]) == (8, 4)
    assert [(one["kind"], one["prompts"]) for one in about["sources"]] == [("questions", 8), ("code", 4)]
    assert set(about["recipe"]["data"]) == {"mix", "follow_ups"}
    assert "responses by kind: 4 code, 8 questions" in said
    assert f"{about['counts']['follow_ups']} of 6 follow-ups answered" in said
    assert f"data.max_length={max(len(row['input_ids']) for row in rows)}" in said


def test_second_answers_are_what_the_base_writes_behind_the_whole_conversation(mixed, other_base, tokenizer):
    """Greedy ones token for token; a line break ends an answer, and the template writes that very one behind it."""
    base, seen = load_base(str(other_base), device="cpu"), 0
    for row in (json.loads(line) for line in mixed[0].read_text().splitlines()):
        ids, mask = row["input_ids"], row["loss_mask"]
        first = mask.index(1)
        if 0 not in mask[first:]:
            continue
        last = len(mask) - mask[::-1].index(0)
        asked = tokenizer.decode(ids[first + mask[first:].index(0) : last])
        assert asked.removeprefix("\n").startswith("# user: ")
        assert asked.endswith("\n# assistant: ")
        assert tokenizer.decode(ids[:last]).count("# assistant:") == 2
        seen += 1
        if row["greedy"]:
            prompt = torch.tensor([ids[:last]])
            options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
            assert base.generate(prompt, **options)[0, last:].tolist() == ids[last:]
    assert seen >= 3


def test_a_mix_that_was_cut_off_continues_to_the_same_bytes(mixed, mix, texts, tmp_path):
    output = begun(mixed[0], tmp_path / "cut.jsonl", mixed[0].stat().st_size * 2 // 3)
    assert "continuing" in run(texts, output, *mix)
    assert output.read_bytes() == mixed[0].read_bytes()


def test_prompts_of_a_batch_are_of_similar_length(mixed):
    """All twelve are of one stretch."""
    about = json.loads(about_file(mixed[0]).read_text())
    lengths = [json.loads(line)["loss_mask"].index(1) for line in mixed[0].read_text().splitlines()]
    assert about["order"] == "by length"
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4


def test_a_file_that_was_begun_in_the_order_of_drawing_goes_on_in_it(mixed, mix, texts, tmp_path, monkeypatch):
    """As files are from before prompts were put in order: what is there stays, and no prompt comes twice."""
    monkeypatch.setattr(generate_responses, "by_length", lambda prompts, batch_size: prompts)
    drawn = tmp_path / "drawn.jsonl"
    run(texts, drawn, *mix)
    monkeypatch.undo()
    about = json.loads(about_file(drawn).read_text())
    del about["order"]
    about_file(drawn).write_text(json.dumps(about))
    output = begun(drawn, tmp_path / "cut.jsonl", drawn.stat().st_size * 2 // 3)
    assert "continuing" in run(texts, output, *mix)
    assert output.read_bytes() == drawn.read_bytes() != mixed[0].read_bytes()
    assert "order" not in json.loads(about_file(output).read_text())
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in (output, mixed[0])]
    prompts = [sorted(row["input_ids"][: row["loss_mask"].index(1)] for row in rows) for rows in found]
    assert prompts[0] == prompts[1]


def test_training_reads_the_rows_of_a_mix(mixed, tokenizer):
    corpus = load_corpus(str(mixed[0]), tokenizer, max_length=256)
    rows = [json.loads(line) for line in mixed[0].read_text().splitlines()]
    learned = {tuple(row["input_ids"]): [bool(one) for one in row["loss_mask"]] for row in rows}
    for document in (*corpus.train, *corpus.validation):
        assert document.loss_mask.tolist() == learned[tuple(document.input_ids.tolist())]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_response=3", "unknown key: expected one such as 'num_responses', found 'num_response'"),
        ("data.formta=text", "unknown key: expected one such as 'data.format', found 'data.formta'"),
        ("num_responses=0", "num_responses: expected a number greater than or equal to 1, found 0"),
        ("greedy_fraction=1.5", "greedy_fraction: expected a number less than or equal to 1, found 1.5"),
        ("temperature=-1", "temperature: expected 0 (greedy) or a finite number of at least 0.0001, found -1.0"),
        ("top_k=0", "top_k: expected an integer >= 1, found 0"),
        ("top_p=1.5", "top_p: expected a number in (0, 1], found 1.5"),
        ("min_p=2", "min_p: expected a number in [0, 1], found 2.0"),
        ("seed=-1", "seed: expected a number greater than or equal to 0, found -1"),
        ("dtype=int8", "dtype: expected 'float32', 'bfloat16' or 'float16', found 'int8'"),
        ("output=x.txt", "output: expected a path that ends in .jsonl, found 'x.txt'"),
        ("base=nowhere", "base 'nowhere': expected a folder or hub name of a causal language model, found"),
        ("adapter=nowhere", "nowhere: expected an adapter"),
        ("data.path=nowhere.txt", "data: expected a file or folder, found nothing at nowhere.txt"),
        ("data.path=EMPTY", "EMPTY: expected at least one row of data, found none"),
        (
            "data.path=talk.jsonl",
            "talk.jsonl:2: expected a tokenizer with a chat template for conversations, found none",
        ),
        (
            "data.mix=[{kind: questions, path: q.jsonl}]",
            "data: expected either path or mix, found path and mix",
        ),
        ("data={}", "data: expected either path or mix, found neither"),
        ("data.follow_ups=0.5", "data.follow_ups: expected data.mix beside it, found path '"),
        ("data={mix: []}", "data.mix: expected"),
        ("data={mix: [{kind: songs, path: x}]}", "data.mix.0.kind: expected 'questions', 'code' or 'passages', found"),
        (
            "data={mix: [{kind: code, path: x, weight: 0}]}",
            "data.mix: expected at least one weight above 0",
        ),
        (
            "data={mix: [{kind: code, path: x, weight: -1}]}",
            "data.mix.0.weight: expected a number greater",
        ),
        ("data={mix: [{kind: code, path: x, weight: .inf}]}", "data.mix.0.weight: expected a finite number, found"),
        ("data={mix: [{kind: code, pth: x}]}", "unknown key: expected one such as 'data.mix.0.path', found"),
        (
            "data={mix: [{kind: code, path: x, key: y}]}",
            "data.mix: expected a key for questions only, found 'y' for code",
        ),
        ("data={mix: [{kind: code, path: x}]}", "code: expected python-packages or python-stdlib as its path, found x"),
        (
            "data={mix: [{kind: passages, path: talk.jsonl}]}",
            "talk.jsonl: expected texts for passages, found rows without a text",
        ),
        (
            "data={mix: [{kind: passages, path: python-stdlib}]}",
            "python-stdlib: expected a tokenizer with a chat template for conversations, found none",
        ),
        ("prompt_tokens=1000", "expected a text of at least 1000 tokens (prompt_tokens), found"),
        (
            "prompt_tokens=2041",
            "expected a prompt of at most 2040 tokens, the positions of the base less max_new_tokens",
        ),
    ],
)
def test_unusable_input_is_refused_in_one_line_and_nothing_is_written(override, message, texts, tmp_path, monkeypatch):
    (tmp_path / "EMPTY").mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"text": "held out"}, {"messages": turns}]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    assert message in refusal(texts, tmp_path / "output" / "responses.jsonl", override)
    assert {file.name for file in tmp_path.iterdir()} == {"EMPTY", "talk.jsonl"}


def test_a_file_is_not_continued_by_another_recipe(finished, texts):
    content = finished.read_bytes()
    message = refusal(texts, finished, "temperature=0.5")
    assert "expected temperature = 0.5 as in this recipe, found responses with temperature = 1.0" in message
    assert finished.read_bytes() == content


def test_a_file_is_not_continued_from_other_texts(finished, texts, tmp_path):
    changed = tmp_path / "texts"
    shutil.copytree(texts, changed)
    (changed / "m07.py").write_text("def other():\n    pass\n" * 20)
    output = begun(finished, tmp_path / "cut.jsonl", 4000)
    about = json.loads(about_file(output).read_text())
    about["recipe"]["data"]["path"] = str(changed)
    about_file(output).write_text(json.dumps(about))
    assert "expected responses to the prompts that" in refusal(changed, output)


def test_a_file_is_not_continued_with_other_weights_of_the_same_name(texts, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(resolve_base("tiny-python"), base)
    output = tmp_path / "responses.jsonl"
    run(texts, output, f"base={base}", "num_responses=2", "max_new_tokens=1")
    assert set(json.loads(about_file(output).read_text())["recipe"]["data"]) == {"path", "format", "subset", "split"}
    with output.open("ab") as file:
        file.truncate(10)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    message = refusal(texts, output, f"base={base}", "num_responses=2", "max_new_tokens=1")
    assert "its responses are another base's: input embeddings: expected sha256" in message


def test_a_file_of_other_origin_is_left_alone(texts, tmp_path):
    output = tmp_path / "responses.jsonl"
    output.write_text('{"text": "mine"}\n')
    assert "expected no file or responses to continue, found one without" in refusal(texts, output)
    assert output.read_text() == '{"text": "mine"}\n'
