"""A base that carries its user's own adapter of PEFT: the target is base and adapter, and decoding is exact for it."""

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from covering import every_pair
from greedy_oracle import plain_generate, prompts
from peft import LoraConfig, get_peft_model
from sampling_oracle import PROMPT, WARPERS, Z_LIMIT, chi_square_z, joint_law
from tiny_models import make_adapter, tiny_model

from pardec.model import SelfSpeculativeModel
from pardec.target.fingerprint import differences, fingerprint

K, NEW, V = 3, 16, 61
TARGETS = {
    "all linear layers": "all-linear",
    "with the embeddings": ["q_proj", "down_proj", "embed_tokens"],
    "with the output head": ["v_proj", "lm_head"],
}


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """Saves an adapter of a user, for models of these options, and gives its folder."""
    made = {}

    def users(targets: str | list[str], seed: int = 3, family: str = "llama", **options) -> Path:
        key = str((targets, seed, family, options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("users") / "adapter"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(
                    tiny_model(family, **options), LoraConfig(r=2, lora_alpha=8, target_modules=targets)
                )
                torch.manual_seed(seed)
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.data = torch.randn_like(parameter) * 0.3
                model.save_pretrained(made[key])
        return made[key]

    return users


def greedily(base) -> list[list[int]]:
    return [plain_generate(base, prompt, NEW) for prompt in prompts(V)]


def bring_on(base, folder: Path, name: str | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.load_adapter(str(folder), adapter_name=name)


@pytest.mark.parametrize(
    ("targets", "parts", "dtype"),
    every_pair(list(TARGETS.values()), [{}, {"lora_rank": 2, "head_width": 6}], [torch.float64, torch.float32]),
    ids=str,
)
def test_greedy_tokens_are_those_of_base_and_adapter(users, targets, parts, dtype):
    base = tiny_model("llama", dtype=dtype)
    without = greedily(base)
    adapter = make_adapter(base, K, **parts)
    bring_on(base, users(targets))
    expected = greedily(base)
    assert expected != without
    model = SelfSpeculativeModel(base, None, adapter)
    for mode in ("plain", "two_pass", "fused"):
        assert model.generate(prompts(V), max_new_tokens=NEW, mode=mode).token_ids == expected, mode


@pytest.mark.parametrize("parts", [{}, {"lora_rank": 2, "head_width": 6}])
def test_sampled_texts_follow_the_law_of_base_and_adapter(users, parts):
    base = tiny_model("llama", vocab_size=5)
    adapter, warper = make_adapter(base, K, **parts), WARPERS["temperature"]
    without = joint_law(base, PROMPT, 3, warper)
    bring_on(base, users("all-linear", vocab_size=5))
    model = SelfSpeculativeModel(base, None, adapter)
    out = model.generate([PROMPT], max_new_tokens=3, seed=0, num_return_sequences=4000, **warper)
    counts = Counter(map(tuple, out.token_ids))
    assert chi_square_z(counts, joint_law(base, PROMPT, 3, warper)) < Z_LIMIT
    assert chi_square_z(counts, without) > 2 * Z_LIMIT  # the adapter is no small change


@pytest.mark.parametrize("parts", [{}, {"lora_rank": 2, "head_width": 6}])
def test_what_the_user_does_between_calls_is_followed(users, parts):
    """An adapter brought on behind the first call, switched off and on, exchanged and taken away."""
    base = tiny_model("llama", dtype=torch.float32)
    model = SelfSpeculativeModel(base, None, make_adapter(base, K, **parts))
    seen = []

    def check() -> None:
        expected = greedily(base)
        assert model.generate(prompts(V), max_new_tokens=NEW).token_ids == expected
        assert plain_generate(base, prompts(V)[0], NEW, custom_generate=model) == expected[0]
        seen.append(expected)

    check()
    bring_on(base, users("all-linear"), "one")
    check()
    base.disable_adapters()
    check()
    base.enable_adapters()
    check()
    bring_on(base, users("all-linear", seed=4), "two")
    base.set_adapter("two")
    check()
    base.delete_adapter(["one", "two"])
    check()
    assert seen[0] == seen[2] == seen[5] != seen[1] == seen[3] != seen[4]


def test_an_adapter_of_the_user_leaves_the_base_the_base(users):
    """The fingerprint is of the base beneath: what was trained for it may draft for the two together."""
    for targets in TARGETS.values():
        base = tiny_model("llama")
        before = fingerprint(base, None)
        bring_on(base, users(targets))
        assert differences(before, fingerprint(base, None), base.dtype) == []
