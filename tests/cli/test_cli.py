"""The command line: what it prints, and its exit codes 0, 1 and 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from greedy_oracle import plain_generate
from programs import ROOT
from typer.testing import CliRunner

import pardec
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TunedChoice, weights_of, write_tuned
from pardec.cli.program import app, main
from pardec.data.prompt_files import read_prompts
from pardec.decoding.probing.probe_step import text_of
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name
from pardec.target.base import load_tokenizer

K = 2


@pytest.fixture
def save(packaged_adapter, tmp_path):
    """Saves a random adapter of the packaged model; its folder."""

    def saved_with(**parts) -> str:
        directory = tmp_path / "-".join(parts)
        save_adapter(packaged_adapter(K, **parts), directory)
        return str(directory)

    return saved_with


@pytest.fixture
def saved(adapters):
    return str(adapters / "lora")


@pytest.fixture(scope="module")
def expected(tiny_base, tokenizer):
    """Greedy text of the base alone."""
    out = plain_generate(tiny_base, tokenizer("def main():").input_ids, 12)
    return out, tokenizer.decode(out, skip_special_tokens=True)


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def shown(result) -> str:
    """What was printed, without the table around it."""
    return " ".join(result.stdout.replace("│", " ").split())


def test_generate_prints_the_bases_own_text(saved, expected):
    result = run("generate", saved, "--prompt", "def main():", "--max-new-tokens", "12")
    assert result.exit_code == 0, result.output
    assert result.stdout == expected[1] + "\n"


def test_several_prompts_are_told_apart_and_drawn_with_seeds_of_their_own(saved, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main():"}\n' * 2 + json.dumps({"prompt": "def main():\n\x1b[31m"}))
    options = ("--max-new-tokens", "12", "--temperature", "1")
    result = run("generate", saved, "--prompt-file", str(prompts), *options, "--seed", "5")
    assert result.stderr == "[1 of 3] def main():\n[2 of 3] def main():\n[3 of 3] def main(): ?[31m\n"
    texts = ["def main():", "def main():", "def main():\n\x1b[31m"]
    alone = [run("generate", saved, "--prompt", text, *options, "--seed", str(5 + n)) for n, text in enumerate(texts)]
    assert result.stdout == "".join(one.stdout for one in alone)
    assert len({one.stdout for one in alone}) == 3
    assert {one.stderr for one in alone} == {""}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ('{"prompt": "x\\ud800"}', "prompts.jsonl:2: expected Unicode text, found half of a surrogate pair"),
        (json.dumps({"prompt": "x " * 3000}), "error: prompt 2 of 2: prompt and new tokens: expected at most 2048"),
    ],
)
def test_every_prompt_is_judged_before_the_first_is_continued(saved, tmp_path, second, words):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main():"}\n' + second)
    result = run("generate", saved, "--prompt-file", str(prompts))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_json_gives_one_object_per_prompt(saved, expected, mode, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main():"}\n\n{"prompt": "import "}\n')
    result = run("generate", saved, "--prompt-file", str(prompts), "--max-new-tokens", "12", "--json", "--mode", mode)
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == ("def main():", "import ")
    assert (first["token_ids"], first["text"]) == expected
    assert first["mode"] == second["mode"] == mode
    assert first["stats"]["num_new_tokens"] == 12
    assert sum(first["stats"]["accepted_per_step"]) == first["stats"]["num_accepted_tokens"]


def test_prompts_come_from_a_file_and_from_standard_input(saved, expected, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("def main():")
    for arguments in (["--prompt-file", str(file)], ["-"], ["--prompt", "-"], ["--prompt-file", "-"]):
        result = run("generate", saved, *arguments, "--max-new-tokens", "12", stdin="def main():")
        assert result.stdout == expected[1] + "\n", arguments


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ["-"]),
        ("generate", ["--prompt", "-"]),
        ("generate", ["--prompt-file", "-"]),
        ("tune", ["--prompt-file", "-"]),
    ],
)
def test_a_standard_input_that_is_closed_is_one_line_and_exit_code_2(saved, monkeypatch, command, arguments, capsys):
    monkeypatch.setattr(sys, "argv", ["pardec", command, saved, *arguments])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: prompt: expected text on standard input, found it closed\n"


def test_only_newlines_end_a_prompt_of_a_file(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e\x1cf"]
    prompts = tmp_path / "prompts.jsonl"
    lines = (json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    prompts.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert read_prompts(None, None, str(prompts)) == texts


def test_compare_shows_both_and_that_they_agree(saved):
    result = run("generate", saved, "--prompt", "def main():", "--max-new-tokens", "12", "--compare", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["identical"] is True
    assert found["plain"]["token_ids"] == found["fused"]["token_ids"]
    assert found["ratio_to_plain"] > 0
    table = run("generate", saved, "--prompt", "def main():", "--max-new-tokens", "12", "--compare").stdout
    assert "same tokens as plain: yes" in table
    assert "per step" in table
    assert "tokens/s" in table


def test_compare_ends_with_1_where_the_tokens_differ(saved, monkeypatch):
    from pardec.decoding import verifier
    from pardec.decoding.verify import Verdict

    def careless(target_tokens, draft_tokens, draft_length):  # accepts every draft unseen
        tokens = torch.cat([draft_tokens, target_tokens[:, -1:]], dim=1)
        return Verdict(tokens, draft_length.clone())

    monkeypatch.setattr(verifier, "verify_greedy", careless)
    result = run("generate", saved, "--prompt", "def main():", "--max-new-tokens", "12", "--compare", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["identical"] is False
    check = run("check", saved)
    assert check.exit_code == 1
    assert "DIFFERENT" in check.stdout


def test_a_tie_of_the_dtype_is_told_and_no_difference(saved, monkeypatch):
    from pardec.cli import console
    from pardec.measures.divergence import Divergence

    honest, honest_stream = SelfSpeculativeModel.generate, SelfSpeculativeModel.stream

    def another_token(self, prompts, **options):
        return changed(honest(self, prompts, **options), options["mode"])

    def another_streamed_token(self, prompt, **options):
        return changed((yield from honest_stream(self, prompt, **options)), options["mode"])

    def changed(out, mode):
        if mode == "fused":
            out.token_ids[0][3] += 1
        return out

    def divergence(base, prompt, ids, found, plain):
        assert (ids[0], found[3]) == (honest_ids[0], plain[3] + 1)
        return Divergence("", 3, (found[3], plain[3]), 0.1, 0.01, 0.1, 0.1, 0.2, explained)

    monkeypatch.setattr(SelfSpeculativeModel, "generate", another_token)
    monkeypatch.setattr(SelfSpeculativeModel, "stream", another_streamed_token)
    monkeypatch.setattr(console, "divergence_from", divergence)
    arguments = ["generate", saved, "--prompt", "def main():", "--max-new-tokens", "12", "--compare", "--mode", "fused"]
    for explained, code, words in ((True, 0, "up to a tie of float32 at token 3"), (False, 1, "no")):
        honest_ids = load_tokenizer("tiny-python")("def main():").input_ids
        result = run(*arguments)
        assert (result.exit_code, f"same tokens as plain: {words}\n" in result.stdout) == (code, True), result.stdout
        found = json.loads(run(*arguments, "--json").stdout)
        assert (found["identical"], found["is_tie"]) == (False, explained)
        honest_ids = text_of(pardec.load(saved).target, 12).tolist()
        check = run("check", saved)
        assert check.exit_code == code
        assert ("identical to plain up to a tie of float32 at token 3" in shown(check)) is explained


def test_show_drafts_colours_the_accepted_tokens(tiny_base, tokenizer, saved, expected, monkeypatch):
    import pardec
    from pardec.cli import program
    from pardec.decoding.sampling import TokenLaw

    ids = expected[0]
    model = pardec.load(saved)
    monkeypatch.setattr(program, "load_model", lambda *options: model)  # loading probes the model, which drafts too
    calls = []

    def truth(self, logits):  # the drafts of the prefill are true, later ones are not
        calls.append(None)
        return torch.tensor([ids[1 : K + 1] if len(calls) == 1 else [4000] * K]), None

    monkeypatch.setattr(TokenLaw, "draw", truth)
    result = run("generate", saved, "--prompt", "def main():", "--max-new-tokens", "12", "--show-drafts")
    green = "\x1b[1;32m"
    coloured = [tokenizer.decode([token]) for token in ids[1 : K + 1]]
    assert result.stdout.count(green) >= 1
    plain = result.stdout
    for code in (green, "\x1b[0m", "\x1b[2m"):
        plain = plain.replace(code, "")
    assert plain.startswith(expected[1])
    assert all(f"{green}{text}" in result.stdout or not text.strip() for text in coloured)
    assert f"{K} drafted tokens accepted" in plain


def test_check_shows_the_adapter_and_that_it_is_exact(saved):
    result = run("check", saved)
    assert result.exit_code == 0, result.output
    for words in ("tiny-python", "mask tokens 2, distinct", "rank 2, 42 modules", "head none", "identical to plain"):
        assert words in shown(result)


def test_a_thorough_check_says_what_it_compared_and_fails_where_something_differs(saved, monkeypatch):
    from pardec.measures import thorough

    monkeypatch.setattr(thorough, "CONTEXTS", (8,))
    monkeypatch.setattr(thorough, "NEW_TOKENS", 8)
    monkeypatch.setattr(thorough, "NUM_SAMPLES", 200)
    result = run("check", saved, "--thorough")
    assert result.exit_code == 0, result.output
    for words in ("behind 2044 tokens", "greedy tokens, fused", "200 samples, two_pass", "generate's tokens"):
        assert words in shown(result)
    monkeypatch.setattr(thorough, "_SIGNIFICANCE", 1.1)
    result = run("check", saved, "--thorough")
    assert result.exit_code == 1
    assert "ANOTHER LAW" in shown(result)


def test_check_says_what_stands_at_draft_rows_and_names_the_head(save):
    assert "sampler head width 8, shortlist 5" in shown(run("check", save(head_width=8, shortlist=5)))
    noise = shown(run("check", save(lora_rank=2, draft_input="uniform_noise")))
    assert "random tokens at draft rows 2 " in noise
    assert "mask tokens" not in noise


def test_the_mode_that_was_tuned_is_used_and_another_one_if_asked_for(saved, tmp_path, expected):
    folder = tmp_path / "tuned"
    shutil.copytree(saved, folder)
    facts = (weights_of(folder), 1.0, 2.0, 2.0, 1.0, [0.5, 0.5])
    choice = TunedChoice(device_name(torch.device("cpu")), "float32", False, (1, 1), *facts, mode="two_pass")
    write_tuned(folder, choice)
    arguments = ["generate", str(folder), "--prompt", "def main():", "--max-new-tokens", "12"]

    def drafted(*more: str) -> tuple[float, bool]:
        """Drafted tokens per step, and whether a step takes two forwards."""
        found = json.loads(run(*arguments, "--json", *more).stdout)
        stats, num_steps = found["stats"], len(found["stats"]["accepted_per_step"])
        assert found["token_ids"] == expected[0]
        return stats["num_draft_tokens"] / num_steps, stats["num_forwards"] > num_steps + 1

    assert drafted() == (1, True)
    assert drafted("--mode", "fused") == drafted("--num-speculative-tokens", "2") == (K, False)
    assert drafted("--mode", "plain") == (0, False)
    assert "two_pass" in json.loads(run(*arguments, "--compare", "--json").stdout)
    shown_drafts = run(*arguments, "--show-drafts").stdout
    assert expected[1] in re.sub(r"\x1b\[[0-9;]*m", "", shown_drafts)
    assert "tuned K = 1, two_pass, 4 rows, 2.00 x plain on " in shown(run("check", str(folder)))
    write_tuned(folder, replace(choice, block_lengths=(0,)))
    assert "tuned plain decoding, as nothing measured was faster on " in shown(run("check", str(folder)))
    assert drafted() == (0, False)
    shown_drafts = re.sub(r"\x1b\[[0-9;]*m", "", run(*arguments, "--show-drafts").stdout)
    assert shown_drafts.endswith("\ndecoded plain, a token a step: nothing was drafted\n")
    assert json.loads(run(*arguments, "--compare", "--json").stdout)["fused"]["stats"]["num_draft_tokens"]
    # copies that are asked for stand alone, whatever is printed of them
    assert drafted("--copy-tokens", "4") == (0, False)
    assert not json.loads(run(*arguments, "--compare", "--json", "--copy-tokens", "4").stdout)["fused"]["stats"][
        "num_draft_tokens"
    ]
    shown_drafts = run(*arguments, "--show-drafts", "--copy-tokens", "4").stdout
    assert expected[1] in re.sub(r"\x1b\[[0-9;]*m", "", shown_drafts)
    assert "\n0 drafted tokens accepted" in re.sub(r"\x1b\[[0-9;]*m", "", shown_drafts)


def test_the_head_can_be_left_out(save, monkeypatch):
    asked = []
    generate = SelfSpeculativeModel.generate

    def noting(self, prompts, *, use_head=None, **options):
        asked.append(use_head)
        return generate(self, prompts, use_head=use_head, **options)

    monkeypatch.setattr(SelfSpeculativeModel, "generate", noting)
    arguments = ["--prompt", "def main():", "--max-new-tokens", "12", "--json"]
    with_head = save(head_width=8)
    texts = [
        json.loads(run("generate", with_head, *arguments, *flag).stdout)["text"]
        for flag in ([], ["--head"], ["--no-head"])
    ]
    assert asked == [None, True, False]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "expected some text, found an empty prompt"),
        ([], "expected exactly one of --prompt, --prompt-file and -, found 0"),
        (["--prompt", "x", "-"], "expected exactly one of --prompt, --prompt-file and -, found 2"),
        (["--prompt-file", "/nowhere"], "/nowhere: expected a prompt file, found nothing"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: expected"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "top_p: expected a number in (0, 1], found 0"),
        (
            ["--prompt", "x", "--max-new-tokens", "0"],
            "max_new_tokens: expected an integer >= 1, found 0",
        ),
        (["--prompt", "x", "--max-new-tokens", "2048"], "expected at most 2048 positions"),
        (["--prompt", "x", "--num-speculative-tokens", "3"], "expected at most 2, the number of distinct mask tokens"),
        (["--prompt", "x", "--head"], "use_head: expected an adapter with a sampler head, found none"),
        (["--prompt", "x", "--mode", "tree"], "mode: expected one of plain, two_pass, fused, found 'tree'"),
        (["--prompt", "x", "--verification", "all"], "verification: expected one of token, block, found 'all'"),
        (["--prompt", "x", "--dtype", "float31"], "dtype: expected a torch dtype"),
        (["--prompt", "x", "--device", "toaster"], "device: expected a torch device"),
        (["--prompt", "x", "--device", "meta"], "device: expected a torch device"),
        (
            ["--prompt", "x", "--seed", str(10**30)],
            "seed: expected an integer from 0 to 9223372036854775807, found 1000",
        ),
        (["--prompt", "x", "--temperature", "1e-40"], "temperature: expected 0 (greedy) or a finite number"),
        (["--prompt", "x", "--base", "/no/base"], "base '/no/base': expected a folder or hub name"),
        (["--prompt", "x", "--json", "--show-drafts"], "expected one of --json and --show-drafts, found both"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, arguments, words):
    result = run("generate", saved, *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["generate", "check"])
def test_a_directory_that_is_no_adapter_is_refused(command, tmp_path):
    prompt = ["--prompt", "x"] if command == "generate" else []
    result = run(command, str(tmp_path / "none"), *prompt)
    assert result.exit_code == 2
    assert "expected an adapter directory, found nothing" in result.stderr
    result = run(command, str(tmp_path), *prompt)
    assert result.exit_code == 2
    assert "expected an adapter directory with pardec.json" in result.stderr


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom pardec.cli.program import app\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_standard_input_that_is_no_text_is_one_line(saved):
    command = [sys.executable, "-m", "pardec", "generate", saved, "-"]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "error: standard input: expected UTF-8 text, found another byte at character 3\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check"], "error: Missing argument 'directory'. (pardec check --help)"),
        (["generate", "x", "--temperature", "abc"], "error: Invalid value"),
        (["--bogus"], "error: No such option"),
        (["bogus"], "error: No such command 'bogus'. (pardec --help)"),
    ],
)
def test_command_lines_that_cannot_be_read_end_with_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pardec", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert err.count("\n") == 1


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pardec", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith("pardec ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_it_says_of_itself_is_one_line_of_error_where_there_is_no_room_for_it(option):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pardec", option]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert ended.stderr.startswith("error: ")


def test_a_check_that_nobody_reads_ends_as_other_programs_do(packaged_adapter, tmp_path):
    """Not with 1, which says that something differs."""
    save_adapter(packaged_adapter(2), tmp_path / "adapter")
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "pardec", "check", str(tmp_path / "adapter")]
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, "")
