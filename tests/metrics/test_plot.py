"""The plot: panels, marks and rejected options."""

import argparse
import builtins
import math

import pytest

matplotlib = pytest.importorskip("matplotlib")

from evomoe_plugin.cli import plot as command  # noqa: E402
from evomoe_plugin.config.errors import OptionError  # noqa: E402
from evomoe_plugin.metrics import parse_log  # noqa: E402
from evomoe_plugin.metrics import plot as picture  # noqa: E402
from evomoe_plugin.metrics.panels import smooth  # noqa: E402
from tests.metrics.logs import diversified, evolution, interval, line  # noqa: E402


@pytest.fixture
def figures(monkeypatch):
    """The saved figures, in order."""
    saved = []
    upstream = picture.save
    monkeypatch.setattr(
        picture, "save", lambda figure, out: (saved.append(figure), upstream(figure, out))
    )
    return saved


def drawn(figure):
    """Label of the y axis -> points of the first line."""
    return {
        axes.get_ylabel(): axes.lines[0].get_xydata().tolist() if axes.lines else None
        for axes in figure.axes
    }


def test_all_that_is_logged_is_drawn(tmp_path, figures):
    picture.plot([evolution()], tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]
    panels = drawn(figures[0])
    assert panels["loss (bits per token)"][:2] == [[10, 8.0], [20, 7.6]]
    assert panels["gate temperature"][-1] == [100, 0.1]
    assert panels["experts per token"][3] == [40, 5.0]
    assert panels["time per update (seconds)"][0] == [10, pytest.approx(0.85)]
    assert "perplexity" in panels
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["training", "training, smoothed", "valid"]
    notes = {text.get_text() for axes in figures[0].axes for text in axes.texts}
    assert notes == {"annealing ends, top-1 starts"}


def test_encoder_and_decoder_have_a_line_each(tmp_path, figures):
    values = {"encoder_experts_per_token": 3, "decoder_experts_per_token": 2}
    log = parse_log([interval(n, loss=9, decoder_temperature=1, **values) for n in (10, 20)])
    picture.plot([log], tmp_path / "run.svg")
    lines = {axes.get_ylabel(): axes.lines for axes in figures[0].axes}
    found = lines["experts per token; dashed: decoder"]
    points = [(x.get_linestyle(), [*x.get_ydata()]) for x in found if len(x.get_xdata())]
    assert points[:2] == [("-", [3, 3]), ("--", [2, 2])]
    assert "gate temperature; dashed: decoder" in lines


def test_stability_and_purity_share_a_panel(tmp_path, figures):
    log = parse_log(
        [
            interval(10, loss=9),
            line("valid", num_updates="10", loss="9", purity="0.5"),
            interval(20, loss=8),
            line("valid", num_updates="20", loss="8", purity="0.6", stability="0.9"),
        ]
    )
    picture.plot([log], tmp_path / "run.png")
    (axes,) = (a for a in figures[0].axes if a.get_ylabel().startswith("stability"))
    points = {found.get_linestyle(): found.get_xydata().tolist() for found in axes.lines}
    assert points == {"-": [[20, 0.9]], "--": [[10, 0.5], [20, 0.6]]}


def test_the_spawn_is_marked(tmp_path, figures):
    picture.plot([diversified()], tmp_path / "run.png")
    notes = {text.get_text(): text.xy[0] for axes in figures[0].axes for text in axes.texts}
    assert notes == {"experts spawned": 30, "annealing ends, top-1 starts": 70}
    assert drawn(figures[0])["gate temperature"][0] == [40, 2.0]


def test_perplexity_stands_at_its_loss(tmp_path, figures):
    picture.plot([evolution()], tmp_path / "run.png")
    right = next(axes for axes in figures[0].axes if axes.get_ylabel() == "perplexity")
    labels = [text.get_text() for text in right.get_yticklabels()]
    assert right.get_yticks()[labels.index("100")] == pytest.approx(math.log2(100))


def test_panels_without_metrics_are_left_out(tmp_path, figures):
    picture.plot([parse_log([interval(10, loss=9), interval(20, loss=8)])], tmp_path / "run.svg")
    assert set(drawn(figures[0])) == {"loss (bits per token)", "perplexity"}


def test_runs_are_labelled(tmp_path, figures):
    one, other = evolution(), evolution()
    one.name, other.name = "first", "second"
    picture.plot([one, other], tmp_path / "runs.png")
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["first", "first valid", "second", "second valid"]


def test_smoothing_starts_at_the_first_value():
    assert smooth([4.0, 2.0], 0.5) == pytest.approx([4.0, (0.25 * 4 + 0.5 * 2) / 0.75])
    assert smooth([4.0, 2.0, 3.0], 0) == [4.0, 2.0, 3.0]


def test_smoothing_skips_nan_and_inf():
    averages = smooth([4.0, math.nan, 2.0], 0.5)
    assert math.isnan(averages[1]) and averages[2] == pytest.approx(smooth([4.0, 2.0], 0.5)[1])


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("run.bmp", r"use a suffix among .*\.png"),
        ("run", "use a suffix among"),
        ("nowhere/run.png", "no such folder"),
    ],
)
def test_a_plot_that_cannot_be_written_is_rejected(tmp_path, out, reason):
    with pytest.raises(OptionError, match=reason):
        picture.plot([evolution()], tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "run.png").mkdir()
    with pytest.raises(OptionError, match="cannot be written"):
        picture.plot([evolution()], tmp_path / "run.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(tmp_path, smoothing):
    with pytest.raises(OptionError, match="--smoothing"):
        picture.plot([evolution()], tmp_path / "run.png", smoothing)


def test_without_matplotlib_the_remedy_is_reported(tmp_path, monkeypatch):
    upstream = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return upstream(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match="pip install matplotlib"):
        picture.plot([evolution()], tmp_path / "run.png")


def test_the_command(tmp_path, capsys):
    (tmp_path / "a.log").write_text(interval(10, loss=9) + interval(20, loss=8))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = str(tmp_path / "run.png")
    assert command.run(parser.parse_args([str(tmp_path / "a.log"), "--out", out])) == 0
    assert (tmp_path / "run.png").exists()
    assert capsys.readouterr().out == f"{out}: 2 intervals up to update 20\n"


def test_names_have_as_many_folders_as_it_takes():
    assert command.names(["x/train.log", "y/other.log"]) == ["train", "other"]
    assert command.names(["runs/a/train.log", "runs/b/train.log"]) == ["a/train", "b/train"]
    assert command.names(["train.log", "train.log"]) == ["train.log", "train.log"]
    assert command.names(["", ".", ".."]) == ["", ".", ".."]
