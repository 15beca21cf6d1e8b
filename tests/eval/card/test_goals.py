"""The report's table of what was asked: filled in from result files, measured values, met or not."""

import json

from card.goals import GOALS, NOT_MEASURED, goals_table


def row(num_rows: int, lora: bool, ratio: float, **changes) -> dict:
    figures = {"share_of_bound": 0.83, "ratio_to_plain": ratio}
    return {"rows": num_rows, "lora": lora, "context": 1024, "compile": False, "head": False, **figures, **changes}


def profile(launches: float, copies: float) -> dict:
    return {"rows": 25, "lora": True, "graph_launches_per_step": launches, "copies_to_host_per_step": copies}


def latency(**changes) -> dict:
    rows = [row(1, False, 1.0), row(25, False, 1.1), row(25, True, 1.21), row(81, False, 1.3)]
    far = [row(25, False, 9.0, context=4096), row(81, True, 9.0), row(25, False, 9.0, compile=True)]
    found = {"model": "llama-8b", "dtype": "bfloat16", "captured": True, "rows": far + rows, "profiles": []}
    return found | changes


def speed(**ratios: float) -> dict:
    of = {"batch_size": 1, "way": "fused tuned"}
    rows = [of | {"adapter": adapter, "ratio_to_plain": ratio} for adapter, ratio in ratios.items()]
    others = [{"batch_size": 4, "way": "fused tuned"}, {"batch_size": 1, "way": "fused"}]
    return {"rows": [*rows, *(of | other | {"adapter": "smollm2", "ratio_to_plain": 9.0} for other in others)]}


def table(folder, **results) -> dict[str, list[str]]:
    for name, result in results.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(result))
    return {cells[0]: cells[1:] for cells in goals_table(folder).rows}


def test_without_results_nothing_is_measured(tmp_path):
    found = table(tmp_path)
    assert len(found) == len(GOALS)
    assert set(map(tuple, found.values())) == {(NOT_MEASURED, "-")}


def test_steps_are_those_of_the_setting_that_was_asked_for(tmp_path):
    found = table(tmp_path, latency=latency(profiles=[profile(1.0, 1.0), profile(1.0, 2.0)]))
    of = "(llama-8b, bfloat16, context 1024)"
    assert found["captured plain step >= 80 % of the bandwidth bound"] == [f"83.0% {of}", "yes"]
    assert found["25 rows <= 1.10 x plain"] == [f"1.100 x {of}", "yes"]
    assert found["25 rows with LoRA <= 1.20 x plain"] == [f"1.210 x {of}", "no"]
    assert found["81 rows <= 1.35 x plain"] == [f"1.300 x {of}", "yes"]
    assert found["one graph launch a step"][1] == "yes"
    assert found["one copy to the host a step"][1] == "no"


def test_steps_that_were_not_captured_do_not_count(tmp_path):
    found = table(tmp_path, latency=latency(captured=False))
    assert found["25 rows <= 1.10 x plain"] == [NOT_MEASURED, "-"]


def test_one_adapter_that_is_fast_enough_meets_the_goal(tmp_path):
    found = table(
        tmp_path,
        smollm2_speed_greedy=speed(smollm2=1.85, smollm2_embeddings=1.2),
        smollm2_speed_sampled=speed(smollm2=1.4, smollm2_embeddings=1.3),
    )
    greedy, sampled = (cells for asked, cells in found.items() if asked.startswith("SmolLM2"))
    assert greedy == ["1.85 x (smollm2, fused tuned), 1.20 x (smollm2_embeddings, fused tuned)", "yes"]
    assert sampled[1] == "no"
