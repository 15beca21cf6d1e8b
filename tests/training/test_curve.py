"""The picture of a run: what it draws is what the file holds, whatever state the file is in."""

import builtins
import json

import matplotlib.figure
import pytest

from pardec.training import curve

ROWS = [
    {"step": 0, "acceptance/sampled": 1.1, "acceptance/greedy": 1.2, "acceptance/greedy_outside_repetition": None,
     "acceptance/sampled_per_position": [0.1, 0.0]},
    {"step": 10, "loss": 6.0, "argmax_agreement": [0.2, 0.1], "overlap": [0.3, 0.2]},
    {"step": 20, "loss": 3.0, "argmax_agreement": [0.4, 0.2], "overlap": [0.35, 0.25], "head_overlap": [0.4, 0.3]},
    {"step": 20, "acceptance/sampled": 1.5, "acceptance/greedy": 1.6, "acceptance/greedy_outside_repetition": 1.55,
     "acceptance/sampled_per_position": [0.4, 0.1]},
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def write(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def lines_of(axes) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_every_curve_has_the_points_of_the_file(tmp_path, drawn):
    png = tmp_path / "training.png"
    curve.draw_curve(write(tmp_path / "metrics.jsonl", ROWS), png)
    assert png.read_bytes().startswith(b"\x89PNG")
    loss, forced, length, positions = drawn[0].axes
    assert lines_of(loss) == [([10, 20], [6.0, 3.0])]
    assert loss.get_yscale() == "log"
    assert lines_of(forced) == [
        ([10, 20], [0.3, 0.35]),
        ([10, 20], [0.2, 0.25]),
        ([10, 20], [0.2, 0.4]),
        ([10, 20], [0.1, 0.2]),
        ([20], [0.4]),
        ([20], [0.3]),
    ]
    assert {line.get_label(): list(line.get_ydata()) for line in length.get_lines()} == {
        "sampled": [1.1, 1.5],
        "greedy": [1.2, 1.6],
        "greedy, outside repetition": [1.55],
    }
    assert lines_of(positions) == [([0, 20], [0.1, 0.4]), ([0, 20], [0.0, 0.1])]
    for axes in (forced, length, positions):
        low, high = axes.get_ylim()
        assert all(low <= y <= high for _, ys in lines_of(axes) for y in ys)


def test_the_floor_is_a_line_through_the_whole_picture(tmp_path, drawn):
    floors = {"step": 0, "floor/length": 2.25, "floor/length_with_head": 3.5}
    curve.draw_curve(write(tmp_path / "metrics.jsonl", [floors, *ROWS]), tmp_path / "training.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[2].get_lines()}
    assert lines["possible without a head, sampled"] == [2.25, 2.25]
    assert lines["possible with a head, sampled"] == [3.5, 3.5]


def test_a_loss_that_falls_below_zero_is_drawn_whole(tmp_path, drawn):
    rows = [{"step": 10, "loss": 0.7}, {"step": 20, "loss": -0.2}]
    curve.draw_curve(write(tmp_path / "metrics.jsonl", rows), tmp_path / "training.png")
    loss = drawn[0].axes[0]
    assert loss.get_yscale() == "linear"
    assert lines_of(loss) == [([10, 20], [0.7, -0.2])]


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        ([], ""),
        (ROWS[:1], ""),  # measured before the first step
        (ROWS[1:2], '{"step": 20, "loss": 2'),  # killed while it wrote
        ([{"step": 10, "loss": -1.0}, {"loss": 3}, [1]], "\n\n"),
    ],
)
def test_whatever_there_is_is_drawn(tmp_path, rows, end):
    curve.draw_curve(write(tmp_path / "metrics.jsonl", rows, end), tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_lines_that_cannot_be_read_are_passed_over(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [*ROWS, {"loss": 3}, 7], '{"step": 30, "lo')
    assert curve.read_metrics(path) == ROWS


def test_a_picture_that_cannot_be_finished_leaves_the_older_one(tmp_path, monkeypatch):
    png, metrics = tmp_path / "training.png", write(tmp_path / "metrics.jsonl", ROWS)
    curve.draw_curve(metrics, png)
    before = png.read_bytes()

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        curve.draw_curve(metrics, png)
    assert png.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "training.png"]


def test_without_matplotlib_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    load = builtins.__import__

    def missing(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    curve._can_draw.cache_clear()
    try:
        drawn = [curve.redraw_curve(tmp_path / "metrics.jsonl", tmp_path / "training.png") for _ in range(3)]
    finally:
        curve._can_draw.cache_clear()
    assert drawn == [False] * 3
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert said == "no picture of the curves: No module named 'matplotlib'; pip install 'pardec[plots]' brings it\n"


def test_with_matplotlib_it_is_drawn(tmp_path):
    curve._can_draw.cache_clear()
    assert curve.redraw_curve(write(tmp_path / "metrics.jsonl", ROWS), tmp_path / "training.png")
    assert (tmp_path / "training.png").exists()
