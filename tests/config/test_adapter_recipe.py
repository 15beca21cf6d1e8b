"""Recipes: what is read, what may be overridden, and what a mistake is answered with."""

from pathlib import Path

import pytest

from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import RecipeError, Section, parse_recipe
from pardec.config.recipe_files import load_recipe as load_any_recipe
from pardec.config.train_section import default_anchors
from pardec.layout import nested_block_lengths
from pardec.training.loss import OBJECTIVES

MINIMAL = "base: tiny-python\noutput_dir: runs/x\ndata:\n  path: python-stdlib\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def load_recipe(path, overrides=()) -> Recipe:
    return load_any_recipe(path, overrides, Recipe)


def refusal(path, *overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------- reading


def test_the_least_a_recipe_says_is_base_output_and_data(write):
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.base, recipe.output_dir, recipe.data.path) == ("tiny-python", "runs/x", "python-stdlib")
    assert recipe.adapter.lora is None
    assert recipe == Recipe.model_validate(
        {"base": "tiny-python", "output_dir": "runs/x", "data": {"path": "python-stdlib"}}
    )


def test_every_key_of_the_file_arrives(write):
    recipe = load_recipe(
        write(
            "base: b\noutput_dir: o\n"
            "data: {path: p, format: jsonl, subset: s, split: t, max_length: 64,\n"
            "  min_kept_share: 0.25, validation_path: v, test_path: w, streamed: true, cache: c}\n"
            "adapter: {num_speculative_tokens: 2, mask_sharing: shared,\n"
            "  lora: {r: 8, alpha: 4, target_modules: [q]}}\n"
            "train: {steps: 7, batch_size: 3, objective: cross_entropy,\n"
            "  position_weights: [1, 0.5], seed: 5}\n"
            "eval: {every: 9, num_prompts: 2, batch_size: 1, max_new_tokens: 11, temperature: 0.5, top_k: null}\n"
        )
    )
    assert recipe.data.model_dump() == {
        "path": "p", "format": "jsonl", "subset": "s", "split": "t", "max_length": 64, "min_kept_share": 0.25,
        "validation_path": "v", "test_path": "w", "streamed": True, "cache": "c",
    }  # fmt: skip
    assert recipe.adapter.mask_sharing == "shared"
    assert recipe.adapter.lora is not None
    assert recipe.adapter.lora.model_dump() == {"r": 8, "alpha": 4, "target_modules": ["q"]}
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.seed) == (7, 3, 5)
    assert recipe.train.objective == "cross_entropy"
    assert recipe.position_weights() == [1, 0.5]
    assert recipe.eval.model_dump() == {
        "every": 9, "num_prompts": 2, "batch_size": 1, "max_new_tokens": 11, "temperature": 0.5, "top_k": None,
    }  # fmt: skip


def test_numbers_that_yaml_leaves_strings_become_floats(write):
    """YAML 1.1 takes 3e-3, without a dot, for a string."""
    recipe = load_recipe(write(MINIMAL + "train: {learning_rate: 3e-3, position_weights: 5e-1}\n"))
    assert recipe.train.learning_rate == 0.003
    assert recipe.position_weights() == [1, 0.5, 0.25, 0.125]
    listed = load_recipe(write(MINIMAL + "train: {position_weights: [1e0, 5e-1, 1e-1, 1e-2]}\n"))
    assert listed.position_weights() == [1.0, 0.5, 0.1, 0.01]
    overridden = load_recipe(write(MINIMAL), ["train.lora_learning_rate=2e-4", "train.position_weights=[1,1e-1,0,0]"])
    assert overridden.train.lora_learning_rate == 0.0002
    assert overridden.position_weights() == [1.0, 0.1, 0.0, 0.0]


def test_a_sequence_has_no_more_anchors_than_tokens(write):
    assert load_recipe(write(MINIMAL), ["data.max_length=64", "train.anchors_per_sequence=64"]).anchors() == 64
    found = refusal(write(MINIMAL), "data.max_length=64", "train.anchors_per_sequence=65")
    assert "train.anchors_per_sequence: expected at most data.max_length, 64, found 65" in found


def test_mask_rows_are_those_of_the_blocks_of_a_forward(write):
    keep = "train.keep={ratio: 0.7, floor: 0.2}"
    recipe = load_recipe(write(MINIMAL), ["train.batch_size=3", keep, "adapter.num_speculative_tokens=5"])
    for num_anchors in (1, 2, 7, 64):
        blocks = nested_block_lengths(num_anchors, 5, 0.7, 0.2)
        assert recipe.mask_rows(num_anchors) == 3 * sum(blocks)


def test_one_position_weight_is_a_decay():
    def weights(**train):
        recipe = {"base": "b", "output_dir": "o", "data": {"path": "p"}, "train": train}
        return parse_recipe(recipe, "here", Recipe).position_weights()

    assert weights() == [1, 1, 1, 1]
    assert weights(position_weights=0.8) == pytest.approx([1, 0.8, 0.64, 0.512])


def test_a_bare_no_is_a_precision(write):
    """YAML 1.1 reads it as false."""
    assert load_recipe(write(MINIMAL + "train: {mixed_precision: no}\n")).train.mixed_precision == "no"
    assert load_recipe(write(MINIMAL), ["train.mixed_precision=no"]).train.mixed_precision == "no"
    assert "train.mixed_precision: " in refusal(write(MINIMAL), "train.mixed_precision=yes")


class Inner(Section):
    depth: int = 1


class Other(Section):
    width: int
    inner: Inner | None = None


def test_a_recipe_of_another_kind_is_read_by_the_same_rules(write):
    path = write("width: 3\n")
    assert load_any_recipe(path, ["inner.depth=2"], Other) == Other(width=3, inner=Inner(depth=2))
    with pytest.raises(RecipeError, match=r"unknown key: expected one such as 'inner\.depth', found 'inner\.dept'"):
        load_any_recipe(path, ["inner.dept=2"], Other)


# ---------------------------------------------------------------------- overrides


def test_overrides_win_over_the_file_and_the_last_one_wins(write):
    path = write(MINIMAL + "train: {steps: 5, seed: 1}\n")
    recipe = load_recipe(path, ["train.steps=7", "train.steps=9", "output_dir=elsewhere", "data.max_length=32"])
    assert (recipe.train.steps, recipe.train.seed) == (9, 1)
    assert (recipe.output_dir, recipe.data.max_length) == ("elsewhere", 32)


def test_overrides_make_the_sections_they_need(write):
    recipe = load_recipe(write(MINIMAL + "adapter:\n"), ["adapter.lora.r=2", "eval.top_k=null"])
    assert recipe.adapter.lora is not None
    assert recipe.adapter.lora.r == 2
    assert recipe.eval.top_k is None


def test_override_values_are_yaml(write):
    recipe = load_recipe(
        write(MINIMAL),
        ["adapter.lora={r: 3, target_modules: [q_proj, v_proj]}", "train.trackers=[tensorboard]", "base=a=b"],
    )
    assert recipe.adapter.lora is not None
    assert recipe.adapter.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.train.trackers == ["tensorboard"]
    assert recipe.base == "a=b"


def test_an_override_may_remove_an_optional_section(write):
    assert load_recipe(write(MINIMAL + "adapter: {lora: {r: 4}}\n"), ["adapter.lora=null"]).adapter.lora is None


@pytest.mark.parametrize("override", ["train.steps", "=3", "steps 3"])
def test_an_override_without_key_and_value_is_refused(write, override):
    assert refusal(write(MINIMAL), override) == f"override: expected section.key=value, found {override!r}"


def test_an_override_below_a_value_is_refused(write):
    message = refusal(write(MINIMAL), "base.name=x")
    assert message == "override: expected a section before the dot, found 'base.name=x'"


def test_an_override_that_is_not_yaml_is_refused(write):
    assert "train.steps=[1" in refusal(write(MINIMAL), "train.steps=[1")


# ---------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("output_dirs=x", "output_dirs", "output_dir"),
        ("trian.steps=4", "trian", "train"),
        ("data.maxlength=4", "data.maxlength", "data.max_length"),
        ("adapter.num_spec_tokens=4", "adapter.num_spec_tokens", "adapter.num_speculative_tokens"),
        ("adapter.lora.rank=4", "adapter.lora.rank", "adapter.lora.r"),
        ("adapter.lora.target_module=q", "adapter.lora.target_module", "adapter.lora.target_modules"),
        ("train.learningrate=4", "train.learningrate", "train.learning_rate"),
        ("eval.max_tokens=4", "eval.max_tokens", "eval.max_new_tokens"),
        ("zzz=4", "zzz", None),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(write, override, key, nearest):
    message = refusal(write(MINIMAL), override)
    assert message.endswith(f", found {key!r}")
    assert f"unknown key: expected one such as {nearest!r}" in message or nearest is None


@pytest.mark.parametrize("key", ["strategy", "train.steps_per_epoch", "train.strides", "eval.float32", "data.stream"])
def test_an_unknown_key_is_named_whatever_it_begins_with(write, key):
    section = key.rpartition(".")[0]
    message = refusal(write(MINIMAL), f"{key}=4")
    assert f"unknown key: expected one such as '{section}" in message
    assert message.endswith(f", found {key!r}")


def test_a_mistyped_required_key_is_told_before_it_is_missed(write):
    path = write(MINIMAL.replace("output_dir", "output_folder"))
    assert refusal(path) == f"{path}: unknown key: expected one such as 'output_dir', found 'output_folder'"


def test_an_unknown_key_in_the_file_names_the_file(write):
    path = write(MINIMAL + "train: {stepz: 4}\n")
    assert refusal(path) == f"{path}: unknown key: expected one such as 'train.steps', found 'train.stepz'"


# ---------------------------------------------------------------------- missing and unusable values


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("output_dir: o\ndata: {path: p}\n", "base"),
        ("base: b\ndata: {path: p}\n", "output_dir"),
        ("base: b\noutput_dir: o\n", "data"),
        ("base: b\noutput_dir: o\ndata: {max_length: 64}\n", "data.path"),
    ],
)
def test_a_missing_key_is_named(write, text, key):
    path = write(text)
    assert refusal(path) == f"{path}: expected key {key!r}, found none"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.steps=many", "'many'"),
        ("train.steps=1.5", "1.5"),
        ("train.steps=0", "0"),
        ("train.learning_rate=fast", "'fast'"),
        ("train.learning_rate=-1", "-1"),
        ("train.learning_rate=.nan", "nan"),
        ("train.learning_rate=.inf", "inf"),
        ("train.seed=-1", "-1"),
        ("train.seed=4294967296", "4294967296"),
        ("eval.top_k=0", "0"),
        ("train.objective=mse", "'mse'"),
        ("train.trackers=tensorboard", "'tensorboard'"),
        ("train.temperature=0", "0"),
        ("train.top_k=0", "0"),
        ("adapter.head=512", "512"),
        ("adapter.head.shortlist=0", "0"),
        ("adapter.mask_initialisation=zeros", "'zeros'"),
        ("base=5", "5"),
        ("base=null", "None"),
        ("data=python-stdlib", "'python-stdlib'"),
        ("data.max_length=7", "7"),
        ("data.format=csv", "'csv'"),
        ("adapter.num_speculative_tokens=0", "0"),
        ("adapter.num_speculative_tokens=65", "65"),
        ("adapter.mask_sharing=both", "'both'"),
        ("adapter.lora=16", "16"),
        ("adapter.lora.r=0", "0"),
        ("adapter.lora.target_modules=3", "3"),
        ("eval.temperature=0", "0"),
        ("eval.num_prompts=[]", "[]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(write, override, found):
    key = override.partition("=")[0]
    message = refusal(write(MINIMAL), override)
    assert f": {key}: " in message
    assert message.endswith(f", found {found}")


@pytest.mark.parametrize(("weights", "found"), [("[1, 1]", 2), ("[1, 1, 1, 1, 1]", 5)])
def test_position_weights_must_be_one_per_mask_token(write, weights, found):
    message = refusal(write(MINIMAL), f"train.position_weights={weights}")
    assert message.endswith(f"train.position_weights: expected 4 numbers, found {found}")


@pytest.mark.parametrize("weights", ["-1", "[1, 1, -0.5, 1]", "[0, 0, 0, 0]", "[1, .nan, 1, 1]", ".nan"])
def test_position_weights_must_be_usable_numbers(write, weights):
    assert "train.position_weights: " in refusal(write(MINIMAL), f"train.position_weights={weights}")


@pytest.mark.parametrize("rule", ["expected_length", "prefix_product"])
def test_weights_may_follow_acceptance_by_a_named_rule(write, rule):
    assert load_recipe(write(MINIMAL), [f"train.position_weights={rule}"]).position_weights() == rule


def test_an_unknown_rule_names_the_known_ones(write):
    message = refusal(write(MINIMAL), "train.position_weights=harmonic")
    known = "expected_length, prefix_product"
    assert message.endswith(f"train.position_weights: expected a number, numbers or {known}, found 'harmonic'")


@pytest.mark.parametrize("weights", ["expected_length", "0.8", "[1, 1, 0.5, 0]"])
def test_weights_beside_the_expected_length_as_objective_are_refused(write, weights):
    message = refusal(write(MINIMAL), "train.objective=accepted_length", f"train.position_weights={weights}")
    assert "train.position_weights: expected 1 beside the objective accepted_length, which weighs positions" in message


def test_an_unknown_objective_names_the_known_ones(write):
    message = refusal(write(MINIMAL), "train.objective=mse")
    for name in OBJECTIVES:
        assert load_recipe(write(MINIMAL), [f"train.objective={name}"]).train.objective == name
        assert f"'{name}'" in message


def test_noise_input_needs_a_lora_and_serves_no_head(write):
    noise = "adapter.draft_input=uniform_noise"
    assert "expected a LoRA beside uniform_noise" in refusal(write(MINIMAL), noise)
    assert "expected no sampler head beside uniform_noise" in refusal(
        write(MINIMAL), noise, "adapter.lora.r=4", "adapter.head.width=8"
    )
    assert load_recipe(write(MINIMAL), [noise, "adapter.lora.r=4"]).adapter.draft_input == "uniform_noise"


def test_frozen_parts_come_from_an_adapter_and_leave_something_to_learn(write):
    frozen = "train.frozen=[mask_embeddings]"
    assert "train.frozen: expected adapter.start_from" in refusal(write(MINIMAL), frozen)
    start = "adapter.start_from=runs/x"
    assert refusal(write(MINIMAL), start, frozen).endswith("found all frozen: ['mask_embeddings']")
    assert load_recipe(write(MINIMAL), [start, frozen, "adapter.head.width=8"]).train.frozen == ["mask_embeddings"]


def test_what_is_moved_is_an_adapter_to_start_from(write):
    assert "adapter.transfer: expected adapter.start_from" in refusal(write(MINIMAL), "adapter.transfer=true")
    moving = load_recipe(write(MINIMAL), ["adapter.transfer=true", "adapter.start_from=runs/x"])
    assert moving.adapter.transfer
    # it allows, and changes nothing that is learned
    assert moving.of_checkpoints() == load_recipe(write(MINIMAL), ["adapter.start_from=runs/x"]).of_checkpoints()


def test_anchors_grow_with_the_length_of_sequences_where_no_number_is_named(write):
    asked = {length: load_recipe(write(MINIMAL), [f"data.max_length={length}"]) for length in (256, 512, 2048)}
    anchors = [recipe.anchors() for recipe in asked.values()]
    assert anchors == [default_anchors(length) for length in asked]
    assert anchors == sorted(set(anchors))
    assert anchors[2] == 8 * anchors[0]
    assert [recipe.anchors_to_try()[0] for recipe in asked.values()] == anchors
    # what was begun with a default goes on with the number that it was, and by no other
    named = load_recipe(write(MINIMAL), ["data.max_length=512", f"train.anchors_per_sequence={anchors[1]}"])
    assert named.anchors() == anchors[1]
    assert named.of_checkpoints() == asked[512].of_checkpoints()
    assert named.of_checkpoints()["train"]["anchors_per_sequence"] == anchors[1]


def test_blocks_grow_to_k(write):
    assert load_recipe(write(MINIMAL)).train.grow_speculative_tokens is None
    growing = load_recipe(write(MINIMAL), ["train.grow_speculative_tokens=[1, 2, 4]"])
    assert growing.train.grow_speculative_tokens == [1, 2, 4]


@pytest.mark.parametrize("growth", ["[1, 2, 8]", "[1, 2]", "[2, 1, 4]", "[2, 2, 4]"])
def test_growth_beyond_k_or_not_up_to_it_is_refused(write, growth):
    message = refusal(write(MINIMAL), f"train.grow_speculative_tokens={growth}")
    assert message.endswith(f"expected numbers that rise to K, here 4, found {growth}")


@pytest.mark.parametrize("growth", ["[]", "[0, 4]", "[true, 4]", "[1.0, 4]", "4"])
def test_growth_is_a_list_of_counts(write, growth):
    assert ": train.grow_speculative_tokens" in refusal(write(MINIMAL), f"train.grow_speculative_tokens={growth}")


@pytest.mark.parametrize("override", ["train.keep.ratio=0", "train.keep.ratio=1.1", "train.keep.floor=-0.1"])
def test_token_dropping_takes_shares(write, override):
    assert f"{override.partition('=')[0]}: " in refusal(write(MINIMAL), override)


# ---------------------------------------------------------------------- unusable files


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "nowhere.yaml"
    assert refusal(path) == f"{path}: expected a recipe file, found nothing"


def test_a_folder_is_refused(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: expected YAML, found ")


@pytest.mark.parametrize(
    "text",
    [
        "base: [1, 2\n",
        "base: a: b\n",
        "\tbase: x\n",
        b"base: \xff\xfe\n",
        "x: !!python/object:os.system {}\n",
        "a\0b",
    ],
    ids=["unclosed", "two-colons", "tab", "not-utf8", "python-object", "nul"],
)
def test_a_malformed_file_is_refused(write, text):
    path = write(text)
    assert refusal(path).startswith(f"{path}: expected YAML, found ")


@pytest.mark.parametrize(("text", "found"), [("- base\n- data\n", "list"), ("", "NoneType"), ("tiny-python", "str")])
def test_something_other_than_a_mapping_is_refused(write, text, found):
    path = write(text)
    assert refusal(path) == f"{path}: expected a mapping of sections, found {found}"


def test_recipe_errors_are_value_errors():
    assert issubclass(RecipeError, ValueError)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("base: a\ntrain:\n  steps: 300\n  seed: 1\n  steps: 7\n")
    with pytest.raises(RecipeError, match=r"twice\.yaml: expected YAML, found key 'steps' twice, line 3"):
        load_recipe(path)


def test_mask_rows_are_those_of_blocks_as_long_as_they_are(write):
    recipe = load_recipe(write(MINIMAL), ["train.batch_size=2", "train.keep.ratio=0.5", "train.keep.floor=0"])
    assert [recipe.mask_rows(8, depth) for depth in (1, 2, 4, None)] == [16, 24, 30, 30]
