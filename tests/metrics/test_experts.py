"""Loads of `--moe-log-experts`: logged, parsed, drawn."""

import json
import math
import types

import pytest
import torch

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer
from evomoe_plugin.metrics import expert_plot, parse_log
from evomoe_plugin.report import findings, page
from evomoe_plugin.report.expert_maps import expert_maps
from evomoe_plugin.routing import stats as st
from evomoe_plugin.trainer import expert_log
from evomoe_plugin.trainer.expert_log import by_layer
from tests.metrics.logs import interval, line

LOADS = {10: [[0.5, 0.5], [1.0, 0.0, 0.0]], 20: [[0.25, 0.75], [0.0, 0.5, 0.5]]}


def expert_line(update, loads):
    record = {"experts_num_updates": update, "load": loads, "entropy": [0.1, 0.2]}
    return f"2026-11-30 | INFO | evomoe_plugin.trainer.expert_log | {json.dumps(record)}"


def logged(*updates):
    lines = [expert_line(u, LOADS[u]) for u in updates]
    return parse_log([interval(10, loss=9), *lines], "run")


def test_shares_and_means_per_layer():
    totals = {
        st.TOKENS: torch.tensor([8.0, 8.0, 0.0]).double(),
        st.PAIRS: torch.tensor([16.0, 8.0, 0.0]).double(),
        st.ENTROPY: torch.tensor([4.0, 2.0, 0.0]).double(),
        st.NULL_PAIRS: torch.tensor([2.0, 0.0, 0.0]).double(),
        # A layer of two experts among layers of three; one that LayerDrop left out.
        st.LOAD_E: torch.tensor([[12, 4, math.nan], [0, 2, 6], [0, 0, 0]]).double(),
        st.WEIGHT_E: torch.tensor([[6, 3, math.nan], [0, 1, 1.5], [0, 0, 0]]).double(),
        st.EXPERTS: torch.tensor([16.0, 24.0, 0.0]).double(),
    }
    assert by_layer({**totals, st.EXPERTS: totals[st.EXPERTS] / 2})["experts"] == [1.0, 1.5, None]
    assert by_layer(totals) == {
        "load": [[0.75, 0.25], [0.0, 0.25, 0.75], None],
        "weight": [[0.5, 0.75], [None, 0.5, 0.25], None],
        "experts_per_token": [2.0, 1.0, None],
        "entropy": [0.5, 0.25, None],
        "null": [0.25, 0.0, None],
    }


def test_the_log_is_read_and_repeated_updates_replace_earlier_ones():
    log = logged(10, 20)
    assert [record.update for record in log.experts] == [10, 20]
    assert log.experts[1].layers["load"] == LOADS[20]
    assert [record.update for record in logged(10, 20, 10).experts] == [10]
    assert [record.update for record in log.intervals] == [10] and not log.summaries


def test_layers_of_encoder_and_decoder_are_told_apart():
    line = {"experts_num_updates": 10, "encoder_load": [[1.0]], "decoder_load": [[0.5, 0.5], None]}
    (record,) = parse_log([json.dumps(line)]).experts
    assert record.loads == {
        "encoder, MoE layer 0": [1.0],
        "decoder, MoE layer 0": [0.5, 0.5],
        "decoder, MoE layer 1": None,
    }


def test_the_picture_has_a_map_for_each_layer(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(expert_plot, "save", lambda figure, out: figures.append(figure))
    expert_plot.plot_experts([logged(10, 20)], tmp_path / "loads.png")
    maps = [axes for axes in figures[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in maps] == ["MoE layer 0", "MoE layer 1"]
    for layer, axes in enumerate(maps):
        drawn = axes.collections[0].get_array()
        assert drawn.T.tolist() == [LOADS[10][layer], LOADS[20][layer]]


def test_the_page_has_a_map_and_a_table_for_each_layer():
    text = page.render([logged(10, 20)], [], "mine")
    assert text.count("<h4>MoE layer") == 2
    assert "<title>update 20, expert 1: 75 %</title>" in text
    assert 'title="update 20, expert 1: 0.75">75</td>' in text


def test_a_large_model_has_fewer_columns():
    loads = [[1 / 64] * 64] * 24
    lines = [expert_line(update, loads) for update in range(1, 101)]
    log = parse_log([interval(1, loss=9), *lines], "run")
    group = expert_maps(log)[0]
    assert len(group.maps) == 24 and len(group.maps[0].columns) == 13
    assert group.maps[0].columns[-1] == 100


def test_stability_is_a_map_of_layers_over_validations():
    lines = [interval(10, loss=9, experts_per_token=1)]
    for update, values in ((10, (0.5, 0.25)), (20, (1.0, 0.75))):
        numbers = {f"stability_{n}": value for n, value in enumerate(values)}
        lines.append(line("valid", num_updates=update, stability=0.5, **numbers))
    (group,) = expert_maps(parse_log(lines, "run"))
    (found,) = group.maps
    assert found.title.startswith("stability") and found.columns == [10, 20]
    assert found.values == [[0.5, 0.25], [1.0, 0.75]]


@pytest.mark.parametrize(
    ("loads", "more", "said"),
    [
        ([[0.5, 0.5, 0, 0]] * 3, {}, "2 experts (2, 3) of 4 got no token in update 30, nor in"),
        ([[0.5, 0.5, 0, 0]] * 3, {"experts": [2.0]}, None),  # there are no others
        ([[0.4, 0.2, 0.2, 0.2]] * 2 + [[0.4, 0.4, 0.2, 0]], {}, "expert 3 of 4 got no token in"),
        ([[0.25] * 4] * 2 + [[0.7, 0.1, 0.1, 0.1]], {}, "expert 0 has 70% of all pairs"),
    ],
)
def test_dead_and_collapsed_experts_are_named(loads, more, said):
    lines = [interval(30, loss=9)]
    for update, load_E in zip((10, 20, 30), loads, strict=True):
        lines.append(json.dumps({"experts_num_updates": update, "load": [load_E], **more}))
    found = findings.of_run(parse_log(lines, "run"))
    assert (len(found) == 1) if said is None else any(f"layer 0: {said}" in x for x in found)


def test_a_log_without_loads_and_two_logs_are_refused(tmp_path):
    log = parse_log([interval(10, loss=9)], "run")
    with pytest.raises(OptionError, match="--experts run: its run logged no loads"):
        expert_plot.plot_experts([log], tmp_path / "loads.png")
    with pytest.raises(OptionError, match="give one log"):
        expert_plot.plot_experts([log, log], tmp_path / "loads.png")


def test_tensorboard_gets_a_bar_for_each_expert(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = tensorboard.SummaryWriter(str(tmp_path))
    monkeypatch.setattr(expert_log.progress_bar, "_tensorboard_writers", {"train_inner": writer})
    expert_log._draw("", [[0.5, 0.25, 0.25], None], 20)
    writer.close()
    found = accumulator.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert found.Tags()["histograms"] == ["expert_load/layer_0"]
    (event,) = found.Histograms("expert_load/layer_0")
    assert event.step == 20
    assert event.histogram_value.bucket == [0.5, 0.25, 0.25]
    assert event.histogram_value.bucket_limit == [0.5, 1.5, 2.5]


def test_only_updates_that_are_logged_sum_up_weights(moe_options):
    layer = build_layer(LayerInfo(4, 2), moe_options(), torch.relu)
    updates = iter([8, 9, 10])
    trainer = types.SimpleNamespace(
        cfg=types.SimpleNamespace(model=types.SimpleNamespace(moe_log_experts=10)),
        get_num_updates=updates.__next__,
        get_model=lambda: torch.nn.ModuleList([layer]),
    )
    asked = []
    for _ in range(3):
        expert_log.begin_update(trainer)
        asked.append(layer.counts_weights)
    assert asked == [False, True, False]
