"""train/train_adapter.py: what a run leaves behind, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from adapter_runs import ROOT, checkpoint, train, train_in_own_process
from data_samples import write_jsonl
from launched import free_port
from tiny_models import tiny_model

import pardec
from pardec.data.corpus import load_corpus, standard_prompts
from pardec.measures.acceptance import measure_acceptance
from pardec.measures.held_out import measure_again
from pardec.training.module import Drafter, MaskTokenTrainer
from pardec.training.peft_lora import inject_lora
from pardec.training.steps import Learner, make_schedule

K, T = 3, 20


def test_a_step_draws_the_same_noise_in_a_run_that_is_continued():
    """So the loss of a step depends on the step, not on how often the run was started."""
    model = tiny_model("llama")
    torch.manual_seed(7)
    inject_lora(model, r=2, alpha=4, target_modules="all-linear")
    trainer = MaskTokenTrainer(model, Drafter(K, has_lora=True, draft_input="uniform_noise"))
    parameters = {name: p for name, p in trainer.named_parameters() if p.requires_grad}
    batch = {
        "input_ids": torch.randint(0, 61, (2, T)),
        "loss_mask": torch.ones(2, T, dtype=torch.bool),
        "anchors": torch.stack([torch.randperm(T - 2)[:4] for _ in range(2)]),
    }

    def loss(step: int, seed: int) -> float:
        frozen = torch.optim.SGD(parameters.values(), lr=0.0)
        learner = Learner(
            Accelerator(cpu=True), trainer, parameters, frozen, make_schedule(frozen, 0, 10, 0), seed, None, 1.0
        )
        sums, norm = learner.update([batch], step, with_metrics=False)
        assert norm > 0
        return float(sums[-2, 0])

    torch.manual_seed(1)
    first = loss(step=5, seed=0)
    torch.manual_seed(2)
    assert loss(step=5, seed=0) == first
    assert len({first, loss(step=6, seed=0), loss(step=5, seed=1)}) == 3


def test_two_processes_and_accumulation_have_the_gradients_of_one(text_file, tmp_path):
    """Two processes of batch 1, by accelerate launch; one with 2 accumulated batches of 1; against batch 2."""
    port = f"--main_process_port={free_port()}"
    config = f"--config_file={ROOT / 'recipes/accelerate/1x8.yaml'}"
    settings = {
        "one": (),
        "two": ("train.batch_size=1",),
        "accumulated": ("train.batch_size=1", "train.gradient_accumulation_steps=2", "train.anchors_per_forward=3"),
    }
    gradients, losses = {}, {}
    for name, overrides in settings.items():
        options = (tmp_path / name, text_file, "train.steps=1", *overrides)
        launcher = ("-m", "accelerate.commands.launch", config, "--num_processes=2", port)
        ended = train_in_own_process(*options, launcher=launcher) if name == "two" else train(*options)
        assert ended.code == 0, (name, ended.err[-2000:])
        # after one step AdamW's first moment is a tenth of the (clipped) gradient
        moments = checkpoint(tmp_path / name, "optimizer.safetensors")
        gradients[name] = {key: value for key, value in moments.items() if key.endswith(".exp_avg")}
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(gradients["one"]) == 1 + 3 + 2 * 42  # mask embeddings, head, LoRA
    for name in ("two", "accumulated"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)
        for key, expected in gradients["one"].items():
            # sums in another order: 2e-5 of the largest on a CPU with AMX; a missing sequence changes half of it
            torch.testing.assert_close(
                gradients[name][key], expected, rtol=1e-3, atol=5e-5 * float(expected.abs().max())
            )
    assert gradients["one"]["mask_embeddings.exp_avg"].abs().max() > 0


def test_rows_and_prompts_that_are_not_used_are_told(tmp_path):
    """One held-out prompt without room in the base stops no run, and what is measured can be measured again."""
    learned = [{"input_ids": [n + 1] * 80, "loss_mask": [0] * 10 + [1] * 70} for n in range(60)]
    learned[7] = {"input_ids": [8] * 80, "loss_mask": [0] * 79 + [1]}
    learned[20] = {"input_ids": [21] * 2100, "loss_mask": [0] * 2050 + [1] * 50}
    rows = Path(write_jsonl(tmp_path / "rows.jsonl", learned))
    ended = train(tmp_path / "run", rows, "train.steps=1", "train.batch_size=60")
    assert ended.code == 0, ended.err[-2000:]
    assert (
        "57 rows read, 56 of them used; 57 examples longer than 64 tokens (data.max_length) cut into 112 windows; "
        "1 dropped, as their answers are shorter than two tokens\n"
        f"held-out prompts too long for the base are left out: {rows}:21 (2,050 tokens)\n"
    ) in ended.out
    found, _ = measure_again(pardec.load(tmp_path / "run"))
    assert found.num_prompts == 2
    refused = train(tmp_path / "other", rows, "train.batch_size=60", "data.min_kept_share=1").error
    assert (
        f"{rows}: expected something to learn in at least 100% of the rows (data.min_kept_share), found 57" in refused
    )
    assert not (tmp_path / "other").exists()


def test_the_logged_acceptance_is_what_the_saved_adapter_gives(whole, text_file):
    model = pardec.load(whole)
    measured = model.adapter.metadata.measured
    corpus = load_corpus(str(text_file), model.tokenizer, max_length=64)
    prompts = standard_prompts(corpus.validation, num_prompts=2)
    again = measure_acceptance(model, prompts, max_new_tokens=24, temperature=0.8, top_k=10)
    assert again.to_dict()["mean_acceptance_length"] == measured["sampled"]["mean_acceptance_length"]
    assert model.adapter.metadata.training["versions"]["torch"] == torch.__version__
    assert (whole / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.lerning_rate=1"],
            "unknown key: expected one such as 'train.learning_rate', found 'train.lerning_rate'",
        ),
        (
            ["data.path=/nowhere.jsonl", "data.format=jsonl"],
            "expected a file or folder, found nothing at /nowhere.jsonl",
        ),
        (["base=/no/such/base"], "base '/no/such/base': expected a folder or hub name"),
        (["data.max_length=4096"], "data.max_length: expected at most 2048"),
        (["train.position_weights=[1e38, 1e38]"], "expected a finite loss, found"),
        (["adapter.lora.target_modules=[no_such_layer]"], "no_such_layer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(text_file, tmp_path, overrides, words):
    output = tmp_path / "run"
    assert words in train(output, text_file, *overrides).error
    if "finite" not in words:
        assert not output.exists()


def test_malformed_data_names_file_and_line(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "fine"}\n{"text": 3}\n')
    assert f"{data}:2: expected non-empty 'text'" in train(tmp_path / "run", data).error
    assert not (tmp_path / "run").exists()
