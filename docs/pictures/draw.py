"""Draw the pictures of the documentation, with the package's own gates and schedules.

python docs/pictures/draw.py    # after a change; tests/test_site.py compares the files with this
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from evomoe_plugin import MoELayer
from evomoe_plugin.gates import GateContext
from evomoe_plugin.routing.noise import sequence_keys

HERE = Path(__file__).parent
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]  # told apart by the colour-blind too
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "evomoe",
    "font.family": "sans-serif",
    "font.size": 9,
    "path.simplify": False,
}


def weights(gate: str, tokens: int, experts: int, num_updates: int = 0, **options) -> torch.Tensor:
    """Combine weights [T, E] of random tokens, 0 where a token is not routed to an expert."""
    torch.manual_seed(3)
    x_TD = torch.randn(tokens, 16, dtype=torch.float64)
    ids_T = torch.arange(tokens) % 7
    layer = MoELayer(16, 16, experts, gate=gate, token_counts=[1] * 7, max_updates=1000, **options)
    scorer = getattr(layer.double().layer.gate, "scorer", None)
    if scorer is not None:
        torch.nn.init.normal_(scorer.weight, std=0.5)
    keys_T = sequence_keys(ids_T.unsqueeze(0)).squeeze(0)
    context = GateContext(num_updates=num_updates, token_ids_T=ids_T, token_keys_T=keys_T)
    choice = layer.layer.gate.route(x_TD, context)
    return (choice.weights_TC * choice.mask_TC).detach()


def gates() -> Figure:
    """The weights of several gates for the same tokens."""
    figure = Figure((8, 5.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    shown = [
        ("dense_to_sparse\nat first", "dense_to_sparse", 0, {"temperature_updates": 50}),
        ("dense_to_sparse\nat last", "dense_to_sparse", 90, {"temperature_updates": 50}),
        ("top_k", "top_k", 0, {}),
        ("switch", "switch", 0, {}),
        ("top_p", "top_p", 0, {}),
        ("top_any", "top_any", 0, {}),
        ("relu", "relu", 0, {}),
        ("hash", "hash", 0, {}),
        ("base", "base", 0, {}),
        ("expert_choice", "expert_choice", 0, {"allow_noncausal": True}),
    ]
    for axes, (title, gate, update, options) in zip(figure.subplots(2, 5).flat, shown, strict=True):
        weights_TE = weights(gate, 12, 8, update, **options)
        steps_TE = (8 * weights_TE / weights_TE.max()).ceil()  # rounded alike on every machine
        axes.imshow(
            steps_TE.where(steps_TE > 0, torch.nan),
            cmap="Blues",
            vmin=0,
            vmax=9,
            interpolation="none",
        )
        axes.hlines([i + 0.5 for i in range(11)], -0.5, 7.5, color="#ccc", lw=0.5)
        axes.vlines([i + 0.5 for i in range(7)], -0.5, 11.5, color="#ccc", lw=0.5)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"{(weights_TE > 0).sum() / 12:.2f} per token", fontsize=9)
    return figure


def evolution() -> Figure:
    """Experts per token and temperature of a run with EvoMoE's three phases."""
    figure = Figure((8, 3.2), layout="constrained")
    axes = figure.subplots()
    spawn, length, experts = 200, 600, 8
    updates = list(range(0, 1001, 25))
    loads, taus = [], []
    for update in updates:
        since = update - spawn
        options = {"temperature_updates": length, "gate_noise": "none"}
        routed_TE = weights("dense_to_sparse", 512, experts, max(since, 0), **options) > 0
        loads.append(1.0 if since < 0 else float(routed_TE.sum() / 512))
        taus.append(2.0 + (0.3 - 2.0) * min(max(since, 0) / length, 1))
    axes.step(updates, loads, where="post", color=COLOURS[0], lw=2)
    axes.set(xlim=(0, 1000), ylim=(0, 9), xlabel="update", ylabel="experts per token")
    axes.yaxis.label.set_color(COLOURS[0])
    right = axes.twinx()
    right.plot(updates[8:], taus[8:], color=COLOURS[1], lw=2, ls="--")
    right.set(ylim=(0, 2.25), ylabel="temperature")
    right.yaxis.label.set_color("#a06e00")
    for begin, end, name in (
        (0, 200, "dense phase"),
        (200, 800, "annealing"),
        (800, 1000, "hard routing"),
    ):
        axes.axvspan(begin, end, color="#888", alpha=0.06 if name == "annealing" else 0.16, lw=0)
        axes.text((begin + end) / 2, 8.4, name, ha="center")
    return figure


def path() -> Figure:
    """Six tokens through a layer: only routed pairs are computed."""
    figure = Figure((8, 3.6), layout="constrained")
    axes = figure.subplots()
    routed = [(0, 1), (2,), (1,), (0, 3), (1,), (3, 2)]
    grey = "#d8d8d8"

    def cell(x, y, colour, label=""):
        axes.add_patch(Rectangle((x, y), 0.9, 0.8, facecolor=colour, edgecolor="white", lw=1))
        ink = "black" if colour == grey else "white"
        axes.text(x + 0.45, y + 0.42, label, ha="center", va="center", fontsize=8, color=ink)

    for t, experts in enumerate(routed):
        cell(0, t + 0.5, grey, f"t{t + 1}")
        for e in range(4):
            cell(2.4 + e, t + 0.5, COLOURS[e] if e in experts else "#f4f4f4")
        cell(15, t + 0.5, grey, f"t{t + 1}")
    pairs = [(e, t) for e in range(4) for t, experts in enumerate(routed) if e in experts]
    tops = {}
    for row, (e, t) in enumerate(pairs):
        y = row * 0.85 - 0.3 + 0.25 * e
        cell(8.4, y, COLOURS[e], f"t{t + 1}")
        tops.setdefault(e, []).append(y)
    for e, ys in tops.items():
        box = (11, ys[0]), 2, ys[-1] - ys[0] + 0.8
        axes.add_patch(
            FancyBboxPatch(
                *box, boxstyle="round,pad=0", facecolor="white", edgecolor=COLOURS[e], lw=2
            )
        )
        axes.text(12, (ys[0] + ys[-1] + 0.8) / 2, f"expert {e + 1}", ha="center", va="center")
        axes.annotate(
            "",
            (10.9, (ys[0] + ys[-1] + 0.8) / 2),
            (9.4, (ys[0] + ys[-1] + 0.8) / 2),
            arrowprops={"arrowstyle": "->", "color": "#555"},
        )
    for start, end in ((1.0, 2.3), (6.5, 8.2), (13.3, 14.8)):
        axes.annotate(
            "", (end, 3.4), (start, 3.4), arrowprops={"arrowstyle": "->", "color": "#555"}
        )
    for x, text in (
        (0.45, "tokens"),
        (4.35, "the gate's choice"),
        (8.85, "pairs, sorted"),
        (12, "experts"),
        (15.4, "weighted sums"),
    ):
        axes.text(x, -1, text, ha="center")
    axes.set(xlim=(-0.6, 16.8), ylim=(8.6, -1.6))
    axes.axis("off")
    return figure


def layouts() -> Figure:
    """Two ranks, fully sharded and expert parallel."""
    figure = Figure((8, 3), layout="constrained")
    axes = figure.subplots()
    for x0, title, moved in (
        (0, "fully sharded", "weights of all experts are gathered"),
        (10, "expert parallel", "tokens are sent to their experts"),
    ):
        axes.text(x0 + 4, -0.3, title, ha="center", fontweight="bold")
        for rank in range(2):
            x = x0 + 4.4 * rank
            axes.add_patch(
                FancyBboxPatch(
                    (x, 0.4),
                    3.6,
                    3.6,
                    boxstyle="round,pad=0.1",
                    facecolor="#f6f6f6",
                    edgecolor="#999",
                )
            )
            axes.text(x + 1.8, 0.8, f"rank {rank}", ha="center")
            for e in range(4):
                whole = title == "expert parallel"
                if whole and e // 2 != rank:
                    continue
                width = 2.8 if whole else 1.4
                axes.add_patch(
                    Rectangle(
                        (x + 0.2, 1.2 + 0.65 * (e % 2 * 2 if whole else e)),
                        width,
                        0.5,
                        facecolor=COLOURS[e],
                    )
                )
                axes.text(
                    x + 0.2 + width / 2,
                    1.5 + 0.65 * (e % 2 * 2 if whole else e),
                    f"expert {e + 1}" if whole else f"½ of {e + 1}",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
        axes.annotate(
            "",
            (x0 + 4.5, 2.4),
            (x0 + 3.5, 2.4),
            arrowprops={"arrowstyle": "<->", "color": "#333", "lw": 1.5},
        )
        axes.text(x0 + 4, 4.7, moved, ha="center")
    axes.set(xlim=(-0.5, 18.7), ylim=(5.1, -0.8))
    axes.axis("off")
    return figure


PICTURES = {"gates": gates, "evolution": evolution, "path": path, "layouts": layouts}


def draw(folder: Path) -> None:
    """Write every picture as SVG."""
    with matplotlib.rc_context(STYLE):
        for name, make in PICTURES.items():
            make().savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
