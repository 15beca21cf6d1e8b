"""Studies: what a study file may say, that nothing is done twice or mixed up, and the figures of the table."""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ablate
import pytest
import train_adapter
import yaml
from adapter_runs import brief
from data_samples import code_text
from programs import run, start_here
from studies import study_rows, study_tables, variant_runs
from studies.study import QUICK, View, load_study, shortened
from tiny_models import make_adapter

import pardec
from pardec.adapters.files import save_adapter
from pardec.measures.acceptance import measure_acceptance
from pardec.model import SelfSpeculativeModel

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
SMALL = {"num_prompts": 3, "max_new_tokens": 6}

# stands in for the trainer: notes its call, then does what plan.json says for the variant
TRAINER = """
import json, pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent
output = pathlib.Path(sys.argv[-1].removeprefix("output_dir="))
with (here / "calls").open("a") as file:
    file.write(output.name.rpartition("-")[0] + "\\n")
plan = json.loads((here / "plan.json").read_text())
does = plan["does"].get(output.name.rpartition("-")[0], "train")
if does == "fail":
    print("3/9 steps\\r4/9 steps\\rerror: step 4: expected a finite loss, found loss nan\\nleaving", file=sys.stderr)
    sys.exit(2)
if does == "hang":
    print("step 1 of 9", flush=True)
    time.sleep(60)
while does == "compute" and time.process_time() < 0.3:
    pass
shutil.copytree(here / "adapter", output, dirs_exist_ok=True)
path = output / "pardec.json"
metadata = json.loads(path.read_text())
metadata["training"] = {"recipe": plan["recipes"][output.name] | {"output_dir": str(output)}, "step": 5}
if does == "other recipe":
    metadata["training"]["recipe"]["train"]["steps"] += 1
path.write_text(json.dumps(metadata))
(output / "metrics.jsonl").write_text('{"step": 5, "loss": 2.5}\\n{"step": 5, "acceptance/sampled": 1.5}\\n')
"""


@pytest.fixture(scope="module")
def adapter(packaged_adapter, tmp_path_factory):
    """An adapter of random numbers, K = 4, that takes the place of trained ones."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(packaged_adapter(4), folder)
    return folder


@pytest.fixture(scope="module")
def model(adapter):
    return pardec.load(adapter)


@pytest.fixture
def lab(tmp_path, monkeypatch, adapter, model):
    """Runs studies with a trainer that is none; all its adapters are one, which is loaded once; draws no pictures."""
    monkeypatch.setattr(pardec, "load", lambda directory, device: model)
    monkeypatch.setattr(study_tables, "plot_study", lambda panels, baseline, title, path: path.write_text(title))
    return Lab(tmp_path, monkeypatch, adapter)


@pytest.fixture
def whole_lab(tmp_path, monkeypatch, adapter):
    """The same with everything but the trainer as it is."""
    return Lab(tmp_path, monkeypatch, adapter)


class Lab:
    def __init__(self, folder, monkeypatch, adapter):
        self.folder = folder
        self.evaluation = {**SMALL, "data": str(folder / "prompts.txt")}
        (folder / "prompts.txt").write_text(code_text(300))
        self.work, self.stem, self.does = folder / "work", folder / "out" / "study", {}
        (folder / "train").mkdir()
        (folder / "train" / "train_adapter.py").write_text(TRAINER)
        shutil.copytree(adapter, folder / "train" / "adapter")
        monkeypatch.setattr(variant_runs, "ROOT", folder)
        monkeypatch.setattr(variant_runs, "POLL_SECONDS", 0.05)

    def write(self, variants, **study) -> Path:
        path = self.folder / "some_study.yaml"
        text = yaml.safe_dump(
            {"recipe": RECIPE, "evaluate": self.evaluation, "variants": variants} | study, sort_keys=False
        )
        path.write_text(text)
        return path

    def run(self, variants, *options, **study):
        """(exit code, the last line's object, standard error)"""
        path = self.write(variants, **study)
        recipes = {v.key: v.settings for v in load_study(path).variants if v.recipe}
        plan = {"does": self.does, "recipes": recipes}
        (self.folder / "train" / "plan.json").write_text(json.dumps(plan))
        ended = run(ablate.main, path, "--work", self.work, "--output", self.stem, *options)
        last = ended.out.splitlines()[-1] if ended.out else ""
        return ended.code, json.loads(last) if last.startswith("{") else ended.out, ended.err

    def calls(self) -> list[str]:
        """Names of the variants that the trainer was called for, in order."""
        path = self.folder / "train" / "calls"
        return path.read_text().split() if path.exists() else []


KL = {"name": "kl"}
BARE = {"name": "kl", "overrides": ["adapter.head=null"]}
LK = {"name": "lk", "overrides": ["train.objective=lk"]}
STEPS = {"name": "steps", "overrides": ["train.steps=7"]}


# ---------------------------------------------------------------------- study files


@pytest.mark.parametrize("path", sorted((ROOT / "eval" / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_studies_are_valid_and_show_their_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    assert len(study.variants) > 1
    head = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert any(line.startswith(f"# python eval/ablate.py eval/studies/{path.name}") for line in head)
    assert study.evaluation.split == "validation"  # what chooses defaults must not be what is reported
    assert all(len(variant.views) == 1 or variant.recipe for variant in study.variants)
    assert shortened(study).variants[0].recipe.train.steps == 2


def test_a_grid_is_the_product_of_its_axes(lab):
    grid = {
        "objective": {"kl": [], "lk": ["train.objective=lk"]},
        "K": {"2": ["adapter.num_speculative_tokens=2"], "6": ["adapter.num_speculative_tokens=6"]},
    }
    path = lab.write([{"name": "one", "overrides": ["train.batch_size=3"]}], grid=grid, overrides=["train.seed=3"])
    study = load_study(path, ["train.steps=9"])
    found = [(v.name, v.recipe.train.objective, v.recipe.adapter.num_speculative_tokens) for v in study.variants]
    assert found == [
        ("one", "kl", 4), ("kl+2", "kl", 2), ("kl+6", "kl", 6), ("lk+2", "lk", 2), ("lk+6", "lk", 6),
    ]  # fmt: skip
    assert all((v.recipe.train.steps, v.recipe.train.seed) == (9, 3) for v in study.variants)
    assert study.variants[3].differs == "train.objective=lk adapter.num_speculative_tokens=2"


@pytest.mark.parametrize(
    ("variants", "study", "message"),
    [
        ([KL], {"varints": []}, "unknown key: expected one such as 'variants', found 'varints'"),
        ([KL], {"evaluate": {"num_prompt": 3}}, "unknown key: expected one such as 'evaluate.num_prompts', found"),
        ([KL], {"budget": {"cpu_minutes": 0}}, "budget.cpu_minutes: "),
        ([KL, {"name": "b", "overide": []}], {}, "variant 2 (b): unknown key: expected one such as 'overrides', found"),
        ([KL, {"overrides": []}], {}, "variant 2: expected key 'name', found none"),
        ([{"name": "a", "evaluate": [{"k": 2}]}], {}, "variant 'a': evaluate: unknown key: expected one such as"),
        ([], {}, "expected variants or grid, found neither"),
        ([KL, {**LK, "name": "KL"}], {}, "expected variants of different names, found 'kl' and 'KL'"),
        ([{"name": "a/b"}], {}, "expected letters, digits and . _ + = - with a letter or digit first"),
        ([{"name": ".a"}], {}, "found '.a'"),
        ([KL, {"name": "same", "overrides": ["train.objective=kl"]}], {}, "found 'kl' and 'same' with the same"),
        ([{"name": "a", "overrides": ["train.objektive=lk"]}], {}, "variant 'a': "),
        ([{"name": "a", "overrides": ["train.objektive=lk"]}], {}, "expected one such as 'train.objective'"),
        ([{"name": "a", "recipe": "none.yaml"}], {}, "variant 'a': none.yaml: expected a recipe file, found nothing"),
        ([KL], {"recipe": None}, "variant 'kl': expected key 'recipe', here or for all, found neither"),
        ([{"name": "a", "adapter": "none"}], {}, "none"),
        ([{**LK, "adapter": "x"}], {}, "variant 'lk': expected an adapter or what to train, found both"),
        ([{**KL, "evaluate": [{}, {}]}], {}, "variant 'kl': evaluate: expected different entries, found one twice"),
        ([{**KL, "evaluate": []}], {}, "variant 1 (kl): evaluate: "),
        ([{**KL, "evaluate": [{"num_speculative_tokens": 5}]}], {}, "at most 4, the trained mask embeddings, found 5"),
        ([{**BARE, "evaluate": [{"use_head": True}]}], {}, "expected use_head only where there is a head, found none"),
        ([{**BARE, "evaluate": [{"shortlist": 8}]}], {}, "expected shortlist only where there is a head, found none"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_run_is_refused_before_anything_is_trained(lab, variants, study, message):
    path = lab.write(variants, **study)
    with pytest.raises(ValueError) as error:
        load_study(path)
    assert message in str(error.value)


def test_views_may_draft_beyond_what_was_trained_where_embeddings_are_shared(lab):
    variant = {"name": "a", "overrides": ["adapter.mask_sharing=shared"], "evaluate": [{"num_speculative_tokens": 5}]}
    assert load_study(lab.write([variant])).variants[0].views == (View(num_speculative_tokens=5),)


def test_errors_of_the_command_line_are_one_line_and_exit_code_2(lab):
    for variants, options, message in (
        ([KL, LK], ("--only", "lk,kk"), "--only: expected some of kl, lk, found 'kk'"),
        ([KL, LK], ("--set", "train.objective=lk"), "found 'kl' and 'lk' with the same"),
        ([KL], ("--set", "base=no/such/base"), "no/such/base"),
    ):
        code, out, err = lab.run(variants, *options)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    assert lab.calls() == []
    assert not lab.work.exists()


def test_quick_settings_stand_behind_those_of_the_variant(lab):
    study = shortened(load_study(lab.write([KL, STEPS])))
    assert [variant.recipe.train.steps for variant in study.variants] == [2, 2]
    assert study.variants[1].command(Path("w"))[-len(QUICK) - 2] == "train.steps=7"
    assert (study.evaluation.num_prompts, study.evaluation.max_new_tokens) == (2, 8)


# ---------------------------------------------------------------------- what is done, and what is not done again


def test_a_study_trains_evaluates_and_writes_its_table(whole_lab):
    whole_lab.does = {"lk": "compute"}
    variants = [{**KL, "evaluate": [{}, {"num_speculative_tokens": 2}]}, LK]
    code, result, _ = whole_lab.run(variants, budget={"minutes": 1e-6})
    assert code == 0
    assert whole_lab.calls() == ["kl", "lk"]
    assert json.loads(whole_lab.stem.with_suffix(".json").read_text()) == result
    assert whole_lab.stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = result["rows"]
    assert [(r["variant"], r["view"], r["num_speculative_tokens"]) for r in rows] == [
        ("kl", "", 4), ("kl", "K=2", 2), ("lk", "", 4),
    ]  # fmt: skip
    assert all((r["best_step"], r["final_loss"], r["within_budget"]) == (5, 2.5, False) for r in rows)
    (record,) = (json.loads(path.read_text()) for path in whole_lab.work.glob("lk-*.json"))
    assert record["training"]["cpu_seconds"] >= 0.3  # what the trainer has computed at least
    assert rows[2]["cpu_minutes"] == round(record["training"]["cpu_seconds"] / 60, 2)
    # quickstart: batches of 4 with 64 blocks of 4 mask tokens
    assert [r["mask_rows_per_step"] for r in rows] == [1024] * 3
    # both adapters are the same one, so the same prompts leave nothing between them
    assert rows[0]["difference"] == {"sampled": None, "outside_repetition": None}
    nothing = {"value": 0.0, "interval": [0.0, 0.0]}
    assert rows[2]["difference"] == {"sampled": nothing, "outside_repetition": nothing}
    page = whole_lab.stem.with_suffix(".md").read_text()
    assert "| kl, K=2 | - | 2 |" in page
    assert "| lk | train.objective=lk | 4 |" in page
    assert "over)" in page


def test_what_is_done_is_not_done_again(lab, monkeypatch):
    first = lab.run([KL, LK])[1]
    monkeypatch.setattr(variant_runs, "measure", None)
    code, second, _ = lab.run([KL, LK])
    assert code == 0
    assert lab.calls() == ["kl", "lk"]
    assert second["rows"] == first["rows"]


def test_a_changed_variant_is_trained_in_a_folder_of_its_own(lab):
    lab.run([KL, LK])
    before = {path.name for path in lab.work.iterdir() if path.is_dir()}
    lab.run([KL, {"name": "lk", "overrides": ["train.objective=lk", "train.steps=9"]}])
    assert lab.calls() == ["kl", "lk", "lk"]
    assert before < {path.name for path in lab.work.iterdir() if path.is_dir()}
    lab.run([KL, LK])  # and back: the first one is still there
    assert lab.calls() == ["kl", "lk", "lk"]


def test_changed_evaluation_decodes_again_and_trains_nothing(lab):
    first = lab.run([KL])[1]["rows"][0]
    second = lab.run([KL], evaluate=lab.evaluation | {"max_new_tokens": 9})[1]["rows"][0]
    assert second["greedy"]["num_drafts"] > first["greedy"]["num_drafts"]
    assert lab.calls() == ["kl"]


def test_views_that_are_added_are_measured_alone(lab, monkeypatch):
    lab.run([KL])
    measured, honest = [], variant_runs.measure
    monkeypatch.setattr(variant_runs, "measure", lambda *args: measured.append(args[-1]) or honest(*args))
    lab.run([{**KL, "evaluate": [{}, {"num_speculative_tokens": 1}]}])
    assert measured == [View(num_speculative_tokens=1)]


def test_only_trains_some_and_the_table_shows_all_that_are_done(lab):
    code, result, _ = lab.run([KL, LK, STEPS], "--only", "lk")
    assert code == 0
    assert [row["status"] for row in result["rows"]] == ["not run", "done", "not run"]
    assert result["rows"][1]["difference"]["sampled"] is None  # the first row is what it would be compared with
    code, result, _ = lab.run([KL, LK, STEPS], "--only", "kl")
    assert [row["status"] for row in result["rows"]] == ["done", "done", "not run"]
    assert result["rows"][1]["difference"]["sampled"]["value"] == 0
    assert lab.calls() == ["lk", "kl"]


def test_a_failed_variant_does_not_stop_the_others_and_is_tried_again(lab):
    lab.does = {"kl": "fail"}
    code, result, err = lab.run([KL, LK])
    assert code == 1
    assert [row["status"] for row in result["rows"]] == ["failed", "done"]
    assert result["rows"][0]["reason"] == "error: step 4: expected a finite loss, found loss nan"
    assert "kl: error: step 4: expected a finite loss" in err
    assert "- kl: error: step 4" in lab.stem.with_suffix(".md").read_text()
    lab.does = {}
    code, result, _ = lab.run([KL, LK])
    assert code == 0
    assert [row["status"] for row in result["rows"]] == ["done", "done"]
    assert lab.calls() == ["kl", "lk", "kl"]


def test_a_study_of_which_nothing_went_well_still_says_why(lab):
    lab.does = {"kl": "fail"}
    code, result, _ = lab.run([KL])
    assert code == 1
    assert result["rows"][0]["mark"] is None
    assert lab.stem.with_suffix(".png").exists()


def test_a_variant_that_cannot_be_evaluated_is_a_failed_one(lab, monkeypatch):
    honest = variant_runs.measure

    def measure(model, prompts, evaluation, view):
        if view.num_speculative_tokens == 2:
            raise ValueError("no such thing")
        return honest(model, prompts, evaluation, view)

    monkeypatch.setattr(variant_runs, "measure", measure)
    code, result, _ = lab.run([{**KL, "evaluate": [{}, {"num_speculative_tokens": 2}]}, LK])
    assert code == 1
    assert [(row["status"], row["reason"]) for row in result["rows"]] == [
        ("done", None), ("failed", "error: no such thing"), ("done", None),
    ]  # fmt: skip


def test_a_recipe_that_changes_while_it_is_trained_by_is_noticed(lab):
    lab.does = {"kl": "other recipe"}
    code, result, _ = lab.run([KL, LK])
    assert code == 1
    assert "quickstart.yaml: expected no change while it is trained by" in result["rows"][0]["reason"]
    assert result["rows"][1]["status"] == "done"


def test_a_run_that_is_cut_off_continues_in_the_same_folder_and_counts_all_its_time(lab):
    study = load_study(lab.write([KL]))
    (variant,) = study.variants
    plan = {"does": {"kl": "hang"}, "recipes": {}}
    (lab.folder / "train" / "plan.json").write_text(json.dumps(plan))

    def interrupt(text):
        if text == "step 1 of 9":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), variant_runs.alone(variant, lab.work) as lock:
        variant_runs.train(variant, lab.work, lock, interrupt)
    then = variant_runs.read_record(variant, lab.work)["training"]
    assert then["reason"] == variant_runs.CUT_OFF
    assert not variant_runs.is_trained({"training": then}, variant, lab.work)
    code, _, _ = lab.run([KL])  # the lock is free, as the trainer was ended too
    now = variant_runs.read_record(variant, lab.work)["training"]
    assert code == 0
    assert now["seconds"] > then["seconds"] > 0
    assert now["command"] == then["command"]
    assert lab.calls() == ["kl", "kl"]


def test_a_trainer_that_outlives_its_runner_keeps_others_away(lab):
    (variant,) = load_study(lab.write([KL])).variants
    with variant_runs.alone(variant, lab.work) as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock])
    try:
        code, _, err = lab.run([KL])
        assert code == 2
        assert "expected to be alone, found another run at it" in err
    finally:
        orphan.kill()
        orphan.wait()
    assert lab.run([KL])[0] == 0


def test_an_adapter_that_is_there_is_only_decoded_with_and_again_when_it_has_changed(lab, adapter, packaged_adapter):
    folder = lab.folder / "mine"
    shutil.copytree(adapter, folder)
    variants = [KL, {"name": "mine", "adapter": str(folder)}]
    row = lab.run(variants)[1]["rows"][1]
    assert lab.calls() == ["kl"]
    assert (row["status"], row["minutes"], row["steps"]) == ("done", None, None)
    assert row["difference"]["sampled"]["value"] == 0
    save_adapter(packaged_adapter(4, seed=5), folder)
    assert lab.run(variants)[1]["rows"][1]["git_commit"] is not None
    record = json.loads(next(lab.work.glob("mine-*.json")).read_text())
    assert len({json.dumps(view["settings"]["weights"]) for view in record["views"]}) == 2


def test_an_adapter_that_cannot_be_read_does_not_stop_the_others(whole_lab):
    assert whole_lab.run([KL, LK])[0] == 0
    (folder,) = whole_lab.work.glob("kl-*/")
    weights = folder / "mask_embeddings.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, result, _ = whole_lab.run([KL, LK])
    assert code == 1
    assert [row["status"] for row in result["rows"]] == ["failed", "done"]
    assert "expected sha256" in result["rows"][0]["reason"]
    code, result, _ = whole_lab.run([KL, LK], "--only", "lk")
    assert (code, [row["status"] for row in result["rows"]]) == (0, ["failed", "done"])


def test_what_is_set_for_all_stands_before_what_sets_a_variant_apart(lab):
    study = load_study(lab.write([KL, STEPS], overrides=["train.steps=3"]), ["train.steps=5"])
    assert [variant.recipe.train.steps for variant in study.variants] == [5, 7]


def test_list_prints_commands_and_does_nothing(lab):
    code, out, _ = lab.run([KL, LK], "--list")
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith(f"kl: python train/train_adapter.py {RECIPE} output_dir={lab.work}/kl-")
    assert f"{RECIPE} train.objective=lk output_dir=" in second
    assert lab.calls() == []


# ---------------------------------------------------------------------- figures


def mean_length(pairs) -> float:
    return 1 + sum(accepted for accepted, _ in pairs) / sum(drafts for _, drafts in pairs)


def test_paired_difference_is_that_of_pooled_lengths():
    first, second = [(3, 4), (0, 5), (7, 9)], [(1, 6), (2, 5), (5, 5)]
    found = study_rows.paired_difference(first, second)
    assert found["value"] == pytest.approx(mean_length(first) - mean_length(second), abs=1e-4)


def test_interval_of_two_prompts_spans_all_resamples():
    # each of the four resamples has a quarter of the probability, so the 2.5 and 97.5 percentiles are the extremes
    first, second = [(3, 4), (0, 5)], [(1, 6), (2, 5)]
    every = [
        mean_length([first[i] for i in draw]) - mean_length([second[i] for i in draw])
        for draw in itertools.product(range(2), repeat=2)
    ]
    low, high = study_rows.paired_difference(first, second)["interval"]
    assert (low, high) == (pytest.approx(min(every), abs=1e-4), pytest.approx(max(every), abs=1e-4))


def test_what_prompts_have_in_common_does_not_widen_a_paired_interval():
    easy_and_hard = [(accepted, 10) for accepted in (0, 3, 9, 1, 8, 20, 2)]
    better = [(accepted + 2, drafts) for accepted, drafts in easy_and_hard]
    assert study_rows.paired_difference(better, easy_and_hard) == {"value": 0.2, "interval": [0.2, 0.2]}


def test_without_drafts_there_is_no_difference():
    assert study_rows.paired_difference([(1, 2), (0, 3)], [(0, 0), (0, 0)]) is None


def test_pairs_of_prompts_add_up_to_what_the_decoder_reports(model):
    # the model goes on with what is repeated, so that there is something to leave out
    texts = ["x = 1\n" * 20, *(f"class Shape{n}:\n    def area(self, width):\n" for n in range(5))]
    prompts = model.tokenizer(texts).input_ids
    found = measure_acceptance(model, prompts, max_new_tokens=24)
    pairs, outside = found.pairs, found.outside_pairs
    assert len(pairs) == len(outside) == 6
    assert mean_length(pairs) == pytest.approx(found.mean_acceptance_length)
    assert mean_length(outside) == pytest.approx(found.outside_repetition)
    assert sum(drafts for _, drafts in outside) < sum(drafts for _, drafts in pairs)


def test_views_are_decoded_as_they_say(model, monkeypatch):
    asked, honest = [], measure_acceptance

    def spy(model, prompts, **options):
        asked.append(options)
        return honest(model, prompts, **{name: value for name, value in options.items() if name != "use_head"})

    monkeypatch.setattr(variant_runs, "measure_acceptance", spy)
    evaluation = load_study(ROOT / "eval" / "studies" / "anchors.yaml").evaluation.model_copy(update=SMALL)
    for view in (View(), View(num_speculative_tokens=2, use_head=False)):
        variant_runs.measure(model, [[1, 2, 3]], evaluation, view)
    assert [one["num_speculative_tokens"] for one in asked] == [4, 4, 2, 2]
    assert [one.get("temperature") for one in asked] == [0.8, None] * 2
    assert [one.get("use_head") for one in asked] == [None, None, False, False]


def test_a_view_may_score_another_shortlist(tiny_base, monkeypatch):
    model, seen = SelfSpeculativeModel(tiny_base, None, make_adapter(tiny_base, 2, head_width=4, shortlist=9)), []
    honest = measure_acceptance

    def spy(model, prompts, **options):
        seen.append(model.adapter.metadata.head.shortlist)
        return honest(model, prompts, **options)

    monkeypatch.setattr(variant_runs, "measure_acceptance", spy)
    evaluation = load_study(ROOT / "eval" / "studies" / "anchors.yaml").evaluation.model_copy(update=SMALL)
    for view in (View(), View(shortlist=3)):
        variant_runs.measure(model, [[1, 2, 3]], evaluation, view)
    assert seen == [9, 9, 3, 3]
    assert View(shortlist=3).label() == "shortlist 3"


def rows(*lengths_and_lows):
    return [
        {"status": "done", "sampled": {"mean_acceptance_length": length, "interval": [low, length + 1]}}
        for length, low in lengths_and_lows
    ]


def test_the_best_row_is_marked_and_those_that_reach_into_its_interval():
    found = [*rows((1.4, 1.0), (1.6, 1.5), (1.5, 1.2), (1.49, 1.4)), {"status": "failed"}]
    study_rows.mark(found)
    assert [row["mark"] for row in found] == [None, "best", "level", None, None]


def test_only_differences_that_leave_out_zero_are_bold():
    cases = {(0.1, 0.2): True, (-0.2, -0.1): True, (-0.1, 0.2): False, (0.0, 0.2): False}
    for (low, high), is_bold in cases.items():
        text = study_tables._difference({"value": (low + high) / 2, "interval": [low, high]}, "**")
        assert text.startswith("**") == is_bold


def test_the_last_line_of_a_log_is_told_from_progress_bars_of_older_runs(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: of an older run\n")
    size = log.stat().st_size
    with log.open("a") as file:
        file.write(" 10%|#  \r 20%|## \r\n")
    assert variant_runs.lines_behind(log, size) == ["10%|#", "20%|##"]
    assert variant_runs.reason_of(1, ["10%|#", "boom"]) == "boom"
    assert variant_runs.reason_of(-9, ["boom"]) == "killed by signal 9"
    assert variant_runs.reason_of(0, ["boom"]) is None


def test_a_recipe_without_a_number_of_anchors_has_those_of_its_length(lab):
    overrides = ["train.anchors_per_sequence=null", "data.max_length=64", "train.batch_size=2"]
    (row,) = lab.run([{"name": "a", "overrides": overrides}])[1]["rows"]
    assert row["mask_rows_per_step"] == 2 * 32 * 4


def test_mask_rows_follow_token_dropping(lab):
    overrides = ["train.keep={ratio: 0.5, floor: 0.1}", "train.anchors_per_sequence=8", "train.batch_size=3"]
    (variant,) = load_study(lab.write([{"name": "a", "overrides": overrides}])).variants
    # of 8 blocks 8, 4, 2 and 1 keep their mask token at depths 1 to 4
    assert variant.recipe.mask_rows(8) == 3 * (8 + 4 + 2 + 1)


# ---------------------------------------------------------------------- the real trainer


def test_two_variants_are_trained_and_compared_from_the_command_line(tmp_path, monkeypatch):
    start_here(monkeypatch, train_adapter.main)
    brief(monkeypatch)
    text = tmp_path / "sources.txt"
    text.write_text(code_text(900))
    study = {
        "recipe": RECIPE,
        "variants": [KL, LK],
        "overrides": [f"data.path={text}"],
        "evaluate": {"data": str(text)},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(study))
    folders = ("--work", tmp_path / "work", "--output", tmp_path / "two")
    ended = run(ablate.main, tmp_path / "two.yaml", "--quick", *folders)
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert [(row["status"], row["steps"]) for row in result["rows"]] == [("done", 2), ("done", 2)]
    assert result["num_prompts"] == 2
    # batches of 2 with 4 blocks of 4
    assert result["rows"][0]["mask_rows_per_step"] == 32
    assert result["rows"][1]["final_loss"] != result["rows"][0]["final_loss"]
    assert {path.suffix for path in tmp_path.glob("two.*")} == {".yaml", ".json", ".md", ".png"}
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert f"- {text}: SHA-256 {digest}" in (tmp_path / "two.md").read_text()
