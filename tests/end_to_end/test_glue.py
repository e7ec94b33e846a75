"""Fine-tuning on GLUE, from files to scores, with the experts of a pretrained model."""

from __future__ import annotations

import json
import random

import pytest
import torch

from evomoe_plugin.cli import main
from tests.end_to_end.runs import load
from tests.tiny_runs import ROOT, Runs

MODEL = """--arch roberta_tiny_moe --encoder-layers 2 --encoder-embed-dim 32
--encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --moe-expert-count 4 --max-positions 64
--moe-gate-loss-wt 0.01 --optimizer adam --batch-size 8 --num-workers 0
--no-epoch-checkpoints --log-format json --log-interval 1""".split()
FINE_TUNING = """--task sentence_prediction --criterion moe_sentence_prediction
--init-token 0 --separator-token 2 --moe-temperature-updates 0 --reset-optimizer
--reset-dataloader --reset-meters""".split()
SCORED = {
    "cola": "--num-classes 2 --report-mcc --best-checkpoint-metric mcc".split(),
    "stsb": "--num-classes 1 --regression-target --report-pearson-and-spearman "
    "--best-checkpoint-metric pearson_and_spearman".split(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, CoLA where the first word tells the label, STS-B, and a pretrained model."""
    folder, dice = tmp_path_factory.mktemp("glue"), random.Random(0)

    def words(count):
        return " ".join(f"a{dice.randrange(30)}" for _ in range(count))

    (folder / "text.txt").write_text("\n".join(words(9) for _ in range(300)))
    for name in SCORED:
        (folder / name).mkdir()
    for split, count in (("train", 96), ("dev", 30)):
        cola = [(n % 2, words(5)) for n in range(count)]
        rows = "".join(f"gj04\t{label}\t\t{'no' * label or 'yes'} {s}\n" for label, s in cola)
        (folder / f"cola/{split}.tsv").write_text(rows)
        rows = "".join(f"{words(4)}\t{words(5)}\t{n % 6}\n" for n in range(count))
        (folder / f"stsb/{split}.tsv").write_text("sentence1\tsentence2\tscore\n" + rows)
    data = str(folder / "data")
    text = ["prepare", str(folder / "text.txt"), "--documents-by", "line", "--vocab-size", "290"]
    assert main([*text, "--out", data]) == 0
    for name in SCORED:
        glue = ["prepare", "--glue", name, str(folder / name), "--tokenizer-of", data]
        assert main([*glue, "--out", str(folder / f"{name}-bin")]) == 0
    status = Runs(folder, folder).run(
        "train", data, "--user-dir", ROOT / "evomoe_plugin", *MODEL, "--task", "masked_lm",
        "--criterion", "moe_masked_lm", "--tokens-per-sample", "32", "--lr", "0.002",
        "--max-update", "4", "--save-dir", folder / "pretrained", "--disable-validation",
    )  # fmt: skip
    assert status == 0
    return folder


def fine_tune(folder, name, to, *given):
    status = Runs(folder, folder).run(
        "train", folder / f"{name}-bin", "--user-dir", ROOT / "evomoe_plugin", *MODEL,
        *FINE_TUNING, *SCORED[name], "--maximize-best-checkpoint-metric", "--restore-file",
        folder / "pretrained/checkpoint_last.pt", "--save-dir", to, "--log-file", to / "log",
        *given,
    )  # fmt: skip
    assert status == 0
    lines = [json.loads(line) for line in (to / "log").read_text().splitlines() if line[:2] == '{"']
    return [line for line in lines if "valid_loss" in line]


def test_a_pretrained_model_is_fine_tuned(folder, tmp_path):
    valid = fine_tune(folder, "cola", tmp_path, "--lr", "0.003", "--max-update", "24")
    assert float(valid[-1]["valid_mcc"]) > 90
    assert float(valid[-1]["valid_experts_per_token"]) == 1


def test_experts_and_gates_are_kept_and_scores_are_of_all_ranks(folder, tmp_path):
    two = ("--distributed-world-size", "2", "--ddp-backend", "fully_sharded")
    still = ("--lr", "1e-20", "--max-update", "1")
    scores = []
    for n, given in enumerate((still, (*still, *two))):
        (tmp_path / str(n)).mkdir()
        (valid,) = fine_tune(folder, "stsb", tmp_path / str(n), *given)
        scores.append(float(valid["valid_pearson_and_spearman"]))
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    before = load(folder / "pretrained/checkpoint_last.pt")["model"]
    after = load(tmp_path / "1/checkpoint_last.pt")["model"]
    assert after.keys() - before.keys() == {
        f"classification_heads.sentence_classification_head.{part}.{kind}"
        for part in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    for name, value in before.items():
        if not name.endswith("num_updates"):
            assert torch.allclose(after[name], value, atol=1e-12), name
