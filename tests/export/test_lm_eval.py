"""The calls of lm-evaluation-harness for a causal model, and the harness itself if installed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from evomoe_plugin.export.folder import export

DOCUMENTS = [("w1 w2 w3", "w4 w5"), ("w7", "w8"), ("w30 w20 w10 w1 w1", "w2 w35 w3 w3")]


@torch.no_grad()
def our_likelihoods(trained, documents):
    """Log-likelihood of each continuation after its context."""
    found = []
    for context, continuation in documents:
        given, wanted = trained.codec.encode(context), trained.codec.encode(continuation)
        rows = torch.tensor([[trained.start, *given, *wanted]])
        log_probs = trained.model(rows)[0].log_softmax(-1)[0]
        found.append(sum(float(log_probs[len(given) + i, row]) for i, row in enumerate(wanted)))
    return found


@torch.no_grad()
def test_the_likelihoods_of_a_padded_batch(make_trained, exported, transformers, tmp_path):
    """As `HFLM._loglikelihood_tokens`: rows padded on the right with 0, and no attention mask."""
    trained = make_trained(20)
    model = exported(trained)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "exported", trust_remote_code=True
    )
    rows, spans = [], []
    for context, continuation in DOCUMENTS:
        whole = tokenizer.encode(f"{context} {continuation}")
        start = len(tokenizer.encode(context))
        rows.append(torch.tensor(whole[:-1]))
        spans.append((start, whole[start:]))
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    log_probs = model(batch).logits.log_softmax(-1)
    got = [
        sum(float(log_probs[n, start - 1 + i, row]) for i, row in enumerate(wanted))
        for n, (start, wanted) in enumerate(spans)
    ]
    assert got == pytest.approx(our_likelihoods(trained, DOCUMENTS), abs=1e-4)


HARNESS = """
import json, sys
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

folder, tasks, documents = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lm = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=2, dtype="float32",
          add_bos_token=True)
requests = [Instance("loglikelihood", {}, (context, " " + continuation), i)
            for i, (context, continuation) in enumerate(documents)]
found = [score for score, _ in lm.loglikelihood(requests)]
results = lm_eval.simple_evaluate(
    model=lm, tasks=["tiny"], bootstrap_iters=0,
    task_manager=TaskManager(include_path=tasks, include_defaults=False))
assert not any(name.split(".")[0] in ("evomoe_plugin", "fairseq") for name in sys.modules)
print("RESULT", json.dumps([found, results["results"]["tiny"]["acc,none"]]))
"""


@pytest.mark.slow
def test_a_task_of_the_harness(make_trained, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install .[lm-eval]; it is not in the lock")
    trained = make_trained(20)
    export(trained, str(tmp_path / "exported"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    others = [(context, "w9 w9") for context, _ in DOCUMENTS]
    (tasks / "documents.jsonl").write_text(
        "\n".join(
            json.dumps({"context": context, "choices": [right, wrong], "gold": 0})
            for (context, right), (_, wrong) in zip(DOCUMENTS, others, strict=True)
        )
    )
    (tasks / "tiny.yaml").write_text(
        json.dumps(
            {  # YAML reads JSON
                "task": "tiny",
                "dataset_path": "json",
                "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(tasks / "documents.jsonl")}},
                "output_type": "multiple_choice",
                "doc_to_text": "{{context}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            HARNESS,
            str(tmp_path / "exported"),
            str(tasks),
            json.dumps(DOCUMENTS),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    found, accuracy = json.loads(line.removeprefix("RESULT"))
    right, wrong = our_likelihoods(trained, DOCUMENTS), our_likelihoods(trained, others)
    assert found == pytest.approx(right, abs=1e-4)
    better = [a > b for a, b in zip(right, wrong, strict=True)]
    assert accuracy == pytest.approx(sum(better) / len(better))
