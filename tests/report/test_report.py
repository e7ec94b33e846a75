"""`evomoe report`: counts of routing against a loop, charts, and what the page says."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from fairseq.data import indexed_dataset

from evomoe_plugin.cli import main
from evomoe_plugin.data.card import CARD, DataCard
from evomoe_plugin.generation.loading import load_trained_model
from evomoe_plugin.metrics import parse_log
from evomoe_plugin.report import charts, findings, page
from evomoe_plugin.report.charts import Line
from evomoe_plugin.report.routed_sample import LayerRouting, route_samples
from evomoe_plugin.report.token_kinds import BEGINS, INSIDE, NUMBER, PUNCTUATION, kind_of
from evomoe_plugin.report.token_sources import TokenSources, grouped
from tests.cli.checkpoints import save_checkpoint
from tests.export.conftest import make_trained, words  # noqa: F401  fixtures
from tests.models.conftest import make_config  # noqa: F401  a fixture

TOKENS = 150  # two rows of 64


@pytest.fixture
def checkpoint(make_trained, words, tmp_path):  # noqa: F811
    """A function that saves a tiny model, beside a split `valid`."""
    builder = indexed_dataset.make_builder(str(words / "valid.bin"), "mmap", vocab_size=40)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        document = torch.randint(4, 40, (20,), generator=generator).square() // 40 + 4
        builder.add_item(torch.cat([document.clamp(max=39), torch.tensor([2])]))
    builder.finalize(str(words / "valid.idx"))

    def make(updates=0, **given):
        torch.manual_seed(3)
        save_checkpoint(make_trained(updates, **given), tmp_path / "moe.pt")
        return str(tmp_path / "moe.pt")

    return make


def counted_by_loops(trained, tokens):
    """(layer, token id, expert) of each pair, as a list, and pairs of experts of a token."""
    moes = [(n, x.moe) for n, x in enumerate(trained.model.decoder.layers) if hasattr(x, "moe")]
    found = collections.defaultdict(list)
    for ids_T in tokens:
        inputs = {}

        def keep(moe, given, inputs=inputs):
            inputs[moe] = given[0]

        hooks = [moe.register_forward_pre_hook(keep) for _, moe in moes]
        trained.model(ids_T.unsqueeze(0))
        for hook in hooks:
            hook.remove()
        for n, moe in moes:
            plan = moe.gate(inputs[moe], moe.context(token_ids_T=ids_T))
            for t, e, w in zip(
                plan.token_ids_N.tolist(),
                plan.expert_ids_N.tolist(),
                plan.weights_N.tolist(),
                strict=True,
            ):
                found[n].append((t, ids_T[t].item(), e, w))
    return found


@pytest.mark.parametrize(
    "given",
    [
        {"moe_gate": "dense_to_sparse", "moe_temperature_updates": 9, "updates": 4},
        {"moe_gate": "top_p", "moe_top_p": 0.6, "moe_null_experts": 1},
    ],
    ids=lambda given: given["moe_gate"],
)
@torch.no_grad()
def test_counts_are_those_of_a_loop(checkpoint, given):
    trained = load_trained_model("checkpoint", checkpoint(**given))
    (sample,) = route_samples(trained, "moe", "valid", TOKENS)
    stream = torch.cat([torch.tensor([2]), *_documents(trained)])
    rows = [stream[i : i + 64] for i in (0, 128)]  # every second, for 150 tokens of 252
    assert sample.tokens == 128 and [layer.layer for layer in sample.layers] == [0, 2]
    for layer, (_, pairs) in zip(
        sample.layers, sorted(counted_by_loops(trained, rows).items()), strict=True
    ):
        loads = collections.Counter(e for _, _, e, _ in pairs)
        assert layer.load_E == pytest.approx([loads[e] / len(pairs) for e in range(5)])
        assert layer.experts_per_token == pytest.approx(len(pairs) / 128)
        for e in range(5):
            weights = [w for _, _, expert, w in pairs if expert == e]
            if weights:
                assert layer.weight_E[e] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
            ids = collections.Counter(i for _, i, expert, _ in pairs if expert == e)
            shares = sorted((n / len(weights) for n in ids.values()), reverse=True)[:6]
            assert [share for _, share in layer.commonest[e]] == pytest.approx(shares)
            for name, share in layer.commonest[e]:
                assert ids[trained.dictionary.index(name)] / len(weights) == pytest.approx(share)
        begins = [e for _, i, e, _ in pairs if i > 3]
        assert layer.kinds_KE[BEGINS] == pytest.approx(
            [begins.count(e) / len(begins) for e in range(5)]
        )
        assert (layer.null_per_token is None) == ("moe_null_experts" not in given)


def _documents(trained):
    dataset = indexed_dataset.MMapIndexedDataset(str(trained.folder / "valid"))
    return [dataset[i] for i in range(len(dataset))]


@torch.no_grad()
def test_what_experts_share(checkpoint):
    trained = load_trained_model("checkpoint", checkpoint(moe_gate="top_k", moe_top_k=2))
    experts = trained.model.decoder.layers[0].moe.experts
    for parameter in experts.parameters():
        parameter[1] = -2 * parameter[0]
        parameter[2] = parameter[0]
    layer = route_samples(trained, "moe", "valid", TOKENS)[0].layers[0]
    assert layer.similarity_EE[0][1:3] == pytest.approx([-1, 1])
    flat = [torch.cat([p[e].flatten() for p in experts.parameters()]) for e in (0, 3)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert layer.similarity_EE[0][3] == pytest.approx(float(cosine), abs=1e-6)
    rows = [row for row, load in zip(layer.together_EE, layer.load_E, strict=True) if load]
    assert [sum(row) for row in rows] == pytest.approx([2.0] * len(rows))  # itself and one other


ROUTING = LayerRouting(
    number=2,
    layer=5,
    tokens=10,
    experts=4,
    load_E=[0.25] * 4,
    weight_E=[1.0] * 4,
    experts_per_token=1.0,
    entropy=0.1,
    null_per_token=None,
    purity=0.5,
    kinds_KE=[[0.25] * 4] * 5,
    sources_SE=[],
    together_EE=torch.eye(4).tolist(),
    similarity_EE=torch.eye(4).tolist(),
    commonest=[[("<&>", 1.0)]] * 4,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"load_E": [0.5, 0.5, 0, 0]}, "2 experts (2, 3) of 4 got no token"),
        (
            {"load_E": [0.9, 0.05, 0.05, 0.0]},
            "expert 0 has 90% of all pairs: routing has collapsed",
        ),
        ({"similarity_EE": torch.ones(4, 4).tolist()}, "experts 0 and 1, 0 and 2, "),
        ({"purity": 0.99}, "a token's id decides its expert: 99%"),
        # Slots without an expert are not dead; one expert for all tokens says nothing of ids.
        ({"load_E": [0.5, 0.5, math.nan, math.nan], "experts": 2}, None),
        ({"load_E": [1.0, 0, 0, 0], "purity": 1.0}, "collapsed"),
    ],
)
def test_what_stands_out_is_said(change, said):
    found = list(findings._of_layer(dataclasses.replace(ROUTING, **change)))
    assert (not found) if said is None else any(said in text for text in found)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("▁the", "the", BEGINS),
        ("ing", "ing", INSIDE),
        ("Ġcat", " cat", BEGINS),
        ("464", " The", BEGINS),
        ("▁1987", "1987", NUMBER),
        (",", ",", PUNCTUATION),
        ("<0xE4>", "\N{REPLACEMENT CHARACTER}", INSIDE),
        ("gre@@", "gre@@", INSIDE),
    ],
)
def test_kinds_of_tokens(name, text, kind):
    assert kind_of(name, text, marked=True) == kind


def test_without_marks_every_token_is_a_word():
    assert kind_of("ing", "ing", marked=False) == BEGINS


@torch.no_grad()
def test_tokens_of_each_source_are_counted(checkpoint, words, tmp_path):  # noqa: F811
    path = checkpoint(moe_gate="switch")
    save_card(words, [("a/x.txt", 5), ("b.txt", 7)])
    trained = load_trained_model("checkpoint", path)
    (sample,) = route_samples(trained, "moe", "valid", 1000)
    # The model reads the end of a document before the first, and all tokens but the last.
    assert sample.tokens == 12 * 21
    of_first = 1 + 5 * 21
    assert dict(sample.sources) == pytest.approx(
        {"a/x.txt": of_first / 252, "b.txt": 1 - of_first / 252}
    )
    stream = torch.cat([torch.tensor([2]), *_documents(trained)])[:-1]
    rows = [stream[i : i + 64] for i in range(0, 252, 64)]
    for layer, (_, pairs) in zip(
        sample.layers, sorted(counted_by_loops(trained, rows).items()), strict=True
    ):
        # Pairs of a row are sorted by expert; rows follow each other, 64 tokens each.
        places = [place for row in _by_row(pairs, len(rows)) for place in row]
        found = [[0] * 5, [0] * 5]
        for place, expert in places:
            found[place >= of_first][expert] += 1
        for counts, shares in zip(found, layer.sources_SE, strict=True):
            assert shares == pytest.approx([n / sum(counts) for n in counts])


def save_card(folder, items):
    """A card that tells how many items of `valid` are from each input."""
    inputs = [{"name": name, "items": {"valid": n}} for name, n in items]
    card = DataCard({}, {}, {}, 0, inputs, 0, {}, {})
    (folder / CARD).write_text(json.dumps(dataclasses.asdict(card)))


def _by_row(pairs, count):
    """(place in the sample, expert) of the pairs of each row, with one expert a token."""
    starts = list(range(0, len(pairs), 64))
    assert len(starts) == count
    return [
        [(start + t, expert) for t, _, expert, _ in pairs[start : start + 64]] for start in starts
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["in/code/a.txt", "in/prose/b.txt"], ["in/code/a.txt", "in/prose/b.txt"]),
        ([f"in/{n % 2}/{n}.txt" for n in range(13)], [f"in/{n % 2}" for n in range(13)]),
        ([f"{n}.txt" for n in range(13)], [f"{n}.txt" for n in range(11)] + ["other files"] * 2),
    ],
)
def test_many_files_are_grouped(files, expected):
    assert grouped(files) == expected


@pytest.mark.parametrize("inputs", [[], [("a", 3)], [("a", 1), ("b", 1)]])
def test_sources_that_are_not_known(tmp_path, inputs):
    if inputs:
        save_card(tmp_path, inputs)
    assert TokenSources.of(tmp_path, "valid", [4, 4, 4]) is None


# Charts


@pytest.mark.parametrize(("low", "high"), [(0, 7), (0.9, 1), (3, 3), (0, 0), (-2, 5), (1e-9, 3e-9)])
def test_ticks_are_around_the_values(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8


@pytest.mark.parametrize(("low", "high"), [(20, 1000), (33.1, 36.9), (5, 5), (1, 1e9)])
def test_ticks_of_a_logarithmic_axis(low, high):
    found = charts.log_ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 11
    assert found == sorted(set(found))


def test_a_chart_has_every_value_on_hover():
    drawn = charts.chart([Line("a<b", [(0, 1), (10, math.nan), (20, 3)])], "update", "loss")
    assert re.findall(r"<title>(.*?)</title>", drawn) == [
        "a&lt;b: loss 1 at update 0",
        "a&lt;b: loss 3 at update 20",
    ]
    (points,) = re.findall(r'points="(.*?)"', drawn)
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in points.split())
    assert x1 < x2 <= charts.WIDTH and 0 <= y2 < y1 <= charts.HEIGHT


def test_no_chart_of_nothing():
    assert charts.chart([Line("a", [])], "update", "loss") == ""
    assert charts.chart([Line("a", [(1, -1)])], "update", "loss", log=True) == ""


def test_many_points_are_thinned_and_the_last_is_kept():
    drawn = charts.chart([Line("a", [(i, i) for i in range(1001)])], "update", "loss")
    assert "loss 1,000 at update 1,000" in drawn
    assert drawn.count("<circle") <= charts.MOST_POINTS


# The page


class Checked(HTMLParser):
    """Tags that are balanced, and no address but of the page itself."""

    VOID = {"meta", "link", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or value == "data:,", value

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html: str) -> str:
    parser = Checked()
    parser.feed(html)
    assert not parser.open
    return " ".join(" ".join(parser.text).split())


def log_lines(loss: float) -> list[str]:
    lines = []
    for update in (10, 20, 30):
        values = {
            "loss": loss,
            "inner_loss": loss,
            "experts_per_token": 2,
            "wpb": 100,
            "wps": 50,
            "mflops_per_token": 3,
            "dead_experts": 0.25,
            "num_updates": update,
        }
        lines.append(json.dumps({k: str(v) for k, v in values.items()}))
    return [*lines, json.dumps({"valid_ppl": "33.5", "valid_num_updates": "30"})]


def test_the_command_writes_one_page(checkpoint, tmp_path, capsys):
    for name, loss in {"one": 5.0, "two": 4.0}.items():
        (tmp_path / f"{name}.log").write_text("\n".join(log_lines(loss)))
    out = tmp_path / "report.html"
    logs = [str(tmp_path / "one.log"), str(tmp_path / "two.log")]
    path = checkpoint(moe_gate="switch")
    assert main(["report", *logs, "--checkpoint", path, "--tokens", "70", "--out", str(out)]) == 0
    assert "2 runs, 1 checkpoints" in capsys.readouterr().out
    text = checked(out.read_text())
    assert "30 updates. Perplexity on valid: 33.50 at the end." in text
    assert "25% of the experts got no token" in text
    assert "64 tokens of valid , at update 20" in text
    assert "training perplexity by training FLOPs" in text and "Kinds of tokens" in text


def test_a_page_of_a_log_alone_needs_no_checkpoint():
    log = parse_log(log_lines(5.0), "a & b")
    assert page._speed(log) is None
    text = checked(page.render([log], [], "mine"))
    assert "a & b" in text and "Routing of" not in text


def test_parts_of_an_update_are_medians_of_the_second_half():
    lines = []
    for update, forward in ((10, 900), (20, 3), (30, 5), (40, 4)):
        values = {"forward_ms": forward, "backward_ms": 8, "optimizer_ms": 2, "data_wait_ms": 2}
        values |= {"loss": 1, "mfu": 0.25, "ep_wait_ms": 1.5, "num_updates": update}
        lines.append(json.dumps({k: str(v) for k, v in values.items()}))
    log = parse_log(lines, "run")
    speed = page._speed(log)
    assert (speed.parts, speed.exchange, speed.mfu) == ([4.5, 8, 2, 2], 1.5, 0.25)
    assert [start for start, _ in speed.bars] == pytest.approx([0, 27.27, 75.76, 87.88], abs=0.01)
    assert "8 ms" in page.render([log], [], "mine") and speed.hours_left is None


def test_encoder_and_decoder_have_panels_of_their_own():
    values = {"loss": 1, "encoder_experts_per_token": 2, "decoder_experts_per_token": 1}
    values |= {"decoder_dead_experts": 0.5, "wpb": 10, "mflops_per_token": 2}
    log = parse_log([json.dumps(values | {"num_updates": n}) for n in (1, 2)], "run")
    assert log.stacks == ["encoder_", "decoder_"]
    text = checked(page.render([log], [], "mine"))
    assert "experts per token, encoder" in text and "experts per token, decoder" in text
    assert "50% of the experts in the decoder got no token" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint (not given): give it, or a training log"),
        (["no.log"], "LOG no.log: no such file"),
        (["."], "RUN .: has no .log file"),
        (["--checkpoint", "no.pt"], "--checkpoint no.pt"),
        (["--checkpoint", "no.pt", "--tokens", "0"], "--tokens 0: give 1 or more"),
        (["--checkpoint", "no.pt", "--out", "no/page.html"], "there is no folder no"),
    ],
)
def test_what_cannot_be_reported(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", "page.html"]
    assert main(["report", *arguments, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_missing_split_and_a_dense_model_are_refused(checkpoint, tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.html")]
    assert main(["report", "--checkpoint", checkpoint(), "--gen-subset", "test", *out]) == 2
    assert "has no test.idx" in capsys.readouterr().err
    assert main(["report", "--checkpoint", checkpoint(arch="transformer_lm"), *out]) == 2
    assert "has no MoE layer" in capsys.readouterr().err
