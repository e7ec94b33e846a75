"""The published command lines of RoBERTa and translation, at small sizes: any layout gives the same
model, resuming is exact, and fairseq's commands read the checkpoints."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.tasks import setup_task

from evomoe_plugin.cli import main
from evomoe_plugin.generation.loading import OF_TEXT, load_trained_model
from evomoe_plugin.models.freeze import trained_names
from evomoe_plugin.report.routed_sample import route_samples
from tests.end_to_end.runs import assert_same_weights, load
from tests.report.test_report import save_card
from tests.tiny_runs import ROOT, Runs

SIZES = """--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64
--encoder-attention-heads 2 --moe-expert-count 4 --moe-gating-use-fp32
--moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum --dropout 0 --attention-dropout 0
--optimizer adam --adam-betas (0.9,0.98) --weight-decay 0.01 --lr 0.003 --clip-norm 0.5
--log-format json --log-interval 1 --num-workers 0 --no-epoch-checkpoints
--save-interval-updates 4 --seed 3 --max-update 6""".split()
EVOMOE = "--moe-spawn-updates 2 --moe-spawn-method mask --moe-temperature-updates 3".split()
ADAPTIVE = """--moe-gate top_any --moe-max-experts 6 --moe-adapt-record-interval 3
--moe-adapt-window 2""".split()
TASKS = {
    "roberta": """--task masked_lm --arch roberta_large_moe --moe-freq 2 --criterion moe_masked_lm
        --sample-break-mode complete --tokens-per-sample 32 --batch-size 4""".split(),
    "translation": """--task translation --arch transformer_wmt_en_de_big_moe
        --encoder-moe-freq 2 --decoder-moe-freq 2 --share-all-embeddings
        --decoder-layers 2 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64
        --decoder-attention-heads 2 --criterion moe_label_smoothed_cross_entropy
        --label-smoothing 0.1 --report-accuracy --max-tokens 64""".split(),
}
TWO = ("--distributed-world-size", "2", "--update-freq", "1")
FSDP = (*TWO, "--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
LAYOUTS = {
    "one": ("--update-freq", "2"),
    "fsdp": (*FSDP, "--checkpoint-activations"),
    "ep": (*FSDP, "--moe-expert-parallel-size", "2"),
}
NUMBERS = ("loss", "inner_loss", "gnorm")
PREFIXES = {"roberta": ("",), "translation": ("encoder_", "decoder_")}

# The authors' scripts/pretrain_roberta_xl_gumbel_MoE.sh and kdd_scripts/wmt17_en_de_gumbel.sh, with
# small values of their variables; below, what makes model and data small.
PUBLISHED = {
    "roberta": """--task masked_lm --sample-break-mode complete --arch roberta_large_moe
        --criterion masked_lm --tokens-per-sample 32 --batch-size 4 --update-freq 1
        --lr 0.003 --lr-scheduler polynomial_decay --warmup-updates 1
        --optimizer adam --adam-betas (0.9,0.98) --adam-eps 1e-08
        --clip-norm 0.0 --weight-decay 0.01 --dropout 0.1
        --moe-expert-count 4 --moe-freq 2 --moe-gating-use-fp32 --moe-topk-expert
        --moe-normalize-expert-grad sqrt_world_size --moe-eval-capacity-token-fraction -1.0
        --write-checkpoints-asynchronously --save-interval-updates 1 --num-workers 0
        --ddp-backend fully_sharded --max-update 2 --total-num-update 2
        --validate-interval-updates 1 --use-gumbel-softmax --gumbel-decay-scheduler Linear
        --gumbel-decay-factor 5 --max-temperature 2.0 --min-temperature 0.5
        --switch-to-hard-gumbel-softmax 6 --log-format json --log-interval 100 --symlink
        --seed 1234""",
    "translation": """--arch transformer_vaswani_wmt_en_de_big --share-all-embeddings
        --optimizer adam --adam-betas (0.9,0.98) --clip-norm 0.0
        --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
        --dropout 0.3 --weight-decay 0.0001
        --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1
        --moe-gate-loss-wt 0 --moe-gate-loss-combine-method sum
        --moe-expert-count 4 --moe-freq 2 --moe-gating-use-fp32 --moe-top1-expert
        --moe-normalize-expert-grad world_size --moe-eval-capacity-token-fraction -1.0
        --use-gumbel-softmax --gumbel-decay-scheduler Linear --gumbel-decay-factor 5000
        --max-temperature 2.0 --min-temperature 0.5 --switch-to-hard-gumbel-softmax 6000
        --ddp-backend fully_sharded --save-interval-updates 1 --validate-interval-updates 1
        --max-tokens 4096""",
}
# Repeated to evaluate.
MOE = """--arch transformer_vaswani_wmt_en_de_big --share-all-embeddings --is-moe --moe-freq 2
    --moe-expert-count 4 --moe-gating-use-fp32 --moe-top1-expert
    --use-gumbel-softmax --gumbel-decay-factor 5000
    --moe-eval-capacity-token-fraction -1.0""".split()
SMALL = {
    "roberta": """--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64
        --encoder-attention-heads 2""",
    "translation": """--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64
        --encoder-attention-heads 2 --decoder-layers 2 --decoder-embed-dim 32
        --decoder-ffn-embed-dim 64 --decoder-attention-heads 2 --max-tokens 64 --max-update 2""",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences of up to 11 words, and each word for word in reverse order."""
    folder, dice = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for split, count in (("train", 300), ("valid", 24), ("test", 24)):
        source, target = [], []
        for _ in range(count):
            ids = [dice.randrange(40) for _ in range(dice.randrange(3, 12))]
            source.append(" ".join(f"a{i}" for i in ids))
            target.append(" ".join(f"b{i * 7 % 40}" for i in reversed(ids)))
        (folder / f"{split}.de").write_text("\n".join(source) + "\n")
        (folder / f"{split}.en").write_text("\n".join(target) + "\n")
    runs = Runs(folder, folder)
    splits = [x for s in ("train", "valid", "test") for x in (f"--{s}pref", folder / s)]
    given = (*splits, "--workers", "1")
    pair = ("--source-lang", "de", "--target-lang", "en")
    for name, options in (("pairs", (*pair, "--joined-dictionary")), ("mono", ("--only-source",))):
        if name == "mono":
            given = [f"{x}.de" if i % 2 and i < 6 else x for i, x in enumerate(given)]
        assert runs.run("preprocess", *options, *given, "--destdir", folder / name) == 0
    return {"roberta": folder / "mono", "translation": folder / "pairs"}


class Trained:
    """Runs of one task, each made once."""

    def __init__(self, task, data, folder):
        self.task, self.runs, self._done = task, Runs(data, folder), {}

    def __call__(self, name, *given):
        if name not in self._done:
            folder = self.runs.folder / name
            folder.mkdir()
            status = self.runs.run(
                "train", self.runs.data, "--user-dir", ROOT / "evomoe_plugin", *TASKS[self.task],
                *SIZES, *(EVOMOE if "--moe-gate" not in given else ()), *LAYOUTS.get(name, ()),
                "--save-dir", folder, "--log-file", folder / "log", *given,
            )  # fmt: skip
            assert status == 0
            self._done[name] = folder
        return self._done[name]

    def logged(self, name, tag="train_inner"):
        text = (self(name) / "log").read_text()
        found = re.findall(rf"(?:\| {tag} \| )?(\{{.*\"epoch\".*\}})", text)
        return [json.loads(line) for line in found if '"num_updates"' in line]

    def valid(self, name):
        """What validations logged of their samples of tokens."""
        lines = [x for x in (self(name) / "log").read_text().splitlines() if x[:2] == '{"']
        found = [json.loads(line) for line in lines if '"valid_num_updates"' in line]
        named = re.compile(r"valid_(\w+_)?(stability|purity|combine_weight)(_\d)?$")
        return [{k: float(v) for k, v in record.items() if named.match(k)} for record in found]


@pytest.fixture(scope="module", params=TASKS)
def trained(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Trained(request.param, data[request.param], folder)


@pytest.mark.parametrize(
    ("trained", "layout"),
    [("roberta", "ep"), ("translation", "fsdp"), ("translation", "ep")],
    indirect=["trained"],
)
def test_every_layout_gives_the_same_model(trained, layout):
    one, other = trained.logged("one"), trained.logged(layout)
    assert len(one) == len(other) == 6
    numbers = list(NUMBERS)
    for prefix in PREFIXES[trained.task]:
        numbers += [f"{prefix}{name}" for name in ("gate_loss_balance", "experts_per_token")]
    for a, b in zip(one, other, strict=True):
        for name in numbers:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=3e-3, abs=3e-3), name
    first, second = trained.valid("one")
    names = {
        f"valid_{prefix}{name}{layer}"
        for prefix in PREFIXES[trained.task]
        for name in ("stability", "purity", "combine_weight")
        for layer in ("", "_0")
    }
    assert second.keys() == names
    assert first.keys() == {name for name in names if "stability" not in name}
    for ours, theirs in zip((first, second), trained.valid(layout), strict=True):
        assert theirs == pytest.approx(ours, abs=0.03)  # a few tokens
    assert one[0][f"{prefix}experts_per_token"] == "1"  # before the spawn
    assert one[2][f"{prefix}experts_per_token"] != "1"
    assert_same_weights(
        trained("one") / "checkpoint_last.pt", trained(layout) / "checkpoint_last.pt", atol=3e-3
    )


def test_resuming_is_exact(trained):
    layout = "ep"
    (path,) = trained(layout).glob("checkpoint_*_4.pt")
    resumed = trained(f"resumed {layout}", *LAYOUTS[layout], "--restore-file", path)
    assert trained.logged(f"resumed {layout}")[0]["num_updates"] == "5"
    for a, b in zip(trained.logged(layout)[4:], trained.logged(f"resumed {layout}"), strict=True):
        assert [a[name] for name in NUMBERS] == [b[name] for name in NUMBERS]
    assert_same_weights(trained(layout) / "checkpoint_last.pt", resumed / "checkpoint_last.pt")


PARTS = ("--moe-train-only", "experts,gate,attention")


def test_chosen_parts_are_trained_and_resumed_exactly(trained):
    """Others do not change by a bit."""
    (path,) = trained("parts", *PARTS).glob("checkpoint_*_4.pt")
    last = load(trained("parts") / "checkpoint_last.pt")
    before, after = load(path)["model"], last["model"]
    chosen = trained_names(
        [name for name in after if not name.endswith(("num_updates", "version"))], PARTS[1]
    )
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed - {name for name in after if name.endswith("num_updates")} <= chosen
    for part in ("experts.fc1_weight", "gate.scorer.weight", "attn.v_proj.weight"):
        parts = {name for name in chosen if name.endswith(part)}
        assert parts and parts <= changed
    for prefix in PREFIXES[trained.task]:
        assert any(name.startswith(prefix.replace("_", ".")) for name in changed)
    resumed = trained("resumed parts", *PARTS, "--restore-file", path)
    assert_same_weights(trained("parts") / "checkpoint_last.pt", resumed / "checkpoint_last.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [LAYOUTS["fsdp"], LAYOUTS["ep"], (*TWO, "--ddp-backend", "fsdp2")]
)
def test_chosen_parts_in_every_layout(trained, layout):
    one = trained("one of parts", *PARTS, *LAYOUTS["one"])
    other = trained(f"parts {' '.join(layout)}", *PARTS, *layout)
    assert_same_weights(one / "checkpoint_last.pt", other / "checkpoint_last.pt", atol=3e-3)


def test_fairseq_validate_reports_what_training_did(trained, caplog):
    checkpoint = trained("ep") / "checkpoint_last.pt"
    wanted = load(checkpoint)["extra_state"]["val_loss"]
    caplog.clear()
    status = trained.runs.run(
        "validate", trained.runs.data, "--user-dir", ROOT / "evomoe_plugin", "--path", checkpoint,
        *TASKS[trained.task][:2], "--valid-subset", "valid", "--max-tokens", "64",
        "--num-workers", "0", "--log-format", "json",
    )  # fmt: skip
    assert status == 0
    found = re.search(r'"valid_inner_loss": "([\d.]+)"', caplog.text)[1]
    assert float(found) == pytest.approx(wanted, abs=2e-3)


def test_a_report_routes_a_sample_through_each_side(trained, data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(trained.runs.data, folder)
    save_card(folder, [("x.txt", 10), ("y.txt", 14)])
    checkpoint = str(trained("ep") / "checkpoint_last.pt")
    model = load_trained_model("checkpoint", checkpoint, str(folder), others=OF_TEXT)
    assert (model.target_codec is None) == (trained.task == "roberta")
    samples = route_samples(model, "moe", "valid", 10**6)
    task, totals = setup_task(model.cfg.task), {}
    task.load_dataset("valid")
    batches = task.get_batch_iterator(task.dataset("valid"), max_tokens=200)
    with torch.no_grad():
        for batch in batches.next_epoch_itr(shuffle=False):
            for name, value in model.model(**batch["net_input"])[1]["moe_stats"].items():
                totals[name] = totals.get(name, 0) + value
    for prefix, sample in zip(PREFIXES[trained.task], samples, strict=True):
        (layer,) = sample.layers
        (load_E,) = totals[f"{prefix}tokens_per_expert"]
        assert layer.load_E == pytest.approx((load_E / load_E.sum()).tolist(), abs=0.01)
        assert layer.layer == 1 and sample.tokens == totals[f"{prefix}tokens"]
        first = "b" if prefix == "decoder_" else "a"
        assert {name[0] for tokens in layer.commonest for name, _ in tokens} <= {first, "<"}
        assert {name for tokens in layer.commonest for name, _ in tokens} & {"<mask>", "</s>"}
        has_text = dict(sample.kinds)["begins a word"]
        assert 0.6 < has_text < 1 and has_text + dict(sample.kinds)["no text"] == pytest.approx(1)
    if trained.task == "roberta":
        split = load_indexed_dataset(str(folder / "valid"), None)
        sizes = split.sizes.tolist()
        starts, length = [], 32  # of blocks of whole sentences, after <s>
        for n, size in enumerate(sizes):
            if length + size > 31:
                starts, length = [*starts, n], 0
            length += size
        wanted = sum(sizes[:10]) + sum(n < 10 for n in starts)
        assert dict(sample.sources)["x.txt"] == pytest.approx(wanted / sample.tokens)

    def report(*given):
        return main(["report", "--checkpoint", checkpoint, "--out", str(tmp_path / "page"), *given])

    assert report("--data", str(folder), "--tokens", "60") == 0
    page = (tmp_path / "page").read_text()
    names = [s.name.replace("moe", "checkpoint_last") for s in samples]
    assert re.findall(r"<h2>Routing of (.*?)</h2>", page) == names
    other = next(str(path) for task, path in data.items() if task != trained.task)
    for given, message in (
        (("--data", other), "has no dict."),
        (("--data", str(folder), "--gen-subset", "dev"), "has no dev"),
    ):
        capsys.readouterr()
        assert report(*given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["--bf16", "--fp16", "--memory-efficient-fp16"])
def test_experts_adapt_in_half_precision(trained, precision, caplog):
    """At update 3, on the experts that tokens of updates 2 and 3 chose (DynMoE); from there on with
    masters and moments as a run that resumes reads them."""
    given = (*ADAPTIVE, precision, *(("--fp16-init-scale", "4") if "fp16" in precision else ()))
    name = precision.strip("-")
    trained(name, *given)
    logged = trained.logged(name)
    assert len(logged) == 6 and all(float(line["loss"]) < 20 for line in logged)
    for prefix in PREFIXES[trained.task]:
        assert all(0 < float(line[f"{prefix}experts_per_token"]) <= 6 for line in logged)
        stack = prefix.replace("_", ".") or "encoder."
        assert re.search(rf"{re.escape(stack)}\S*\.moe, update 3: (added|removed) ", caplog.text)
    (path,) = trained(name).glob("checkpoint_*_4.pt")
    resumed = trained(f"resumed {name}", *given, "--restore-file", path)
    assert_same_weights(trained(name) / "checkpoint_last.pt", resumed / "checkpoint_last.pt")


@pytest.mark.parametrize("trained", ["translation"], indirect=True)
def test_fairseq_generate_translates(trained, tmp_path):
    results = []
    for batch in ("1", "8"):
        folder = tmp_path / batch
        status = trained.runs.run(
            "generate", trained.runs.data, "--user-dir", ROOT / "evomoe_plugin", "--path",
            trained("ep") / "checkpoint_last.pt", "--gen-subset", "test", "--beam", "3",
            "--max-len-b", "12", "--batch-size", batch, "--scoring", "sacrebleu",
            "--results-path", folder, "--num-workers", "0",
        )  # fmt: skip
        assert status == 0
        lines = (folder / "generate-test.txt").read_text().splitlines()
        assert "BLEU" in lines[-1]
        results.append(sorted(line.split("\t")[2] for line in lines if line.startswith("H-")))
    assert results[0] == results[1] and len(results[0]) == 24


@pytest.mark.parametrize("task", [pytest.param("roberta", marks=pytest.mark.slow), "translation"])
def test_published_command_lines(task, data, tmp_path):
    """On two ranks they train, resume exactly, and the result is evaluated."""
    runs = Runs(data[task], tmp_path)
    plugin = ("--user-dir", ROOT / "evomoe_plugin")
    command = [runs.data, *PUBLISHED[task].split(), *plugin, *SMALL[task].split(), *TWO[:2]]
    assert runs.run("train", *command, "--save-dir", tmp_path / "whole") == 0
    (first,) = (tmp_path / "whole").glob("checkpoint_*_1.pt")
    resumed = ("--restore-file", first, "--save-dir", tmp_path / "resumed")
    assert runs.run("train", *command, *resumed) == 0
    last = tmp_path / "whole/checkpoint_last.pt"
    assert_same_weights(last, tmp_path / "resumed/checkpoint_last.pt")
    model = load(last)["cfg"]["model"]
    assert (model["moe_gate"], model["moe_combine_weights"]) == ("dense_to_sparse", "softmax")
    assert (model["moe_temperature_start"], model["moe_temperature_end"]) == (2.0, 0.5)
    evaluate, given = {
        "roberta": ("validate", ("--task", "masked_lm", "--batch-size", "4")),
        "translation": ("generate", ("--batch-size", "128", "--beam", "5", "--remove-bpe", *MOE)),
    }[task]
    assert runs.run(evaluate, runs.data, *plugin, "--path", last, *given) == 0
