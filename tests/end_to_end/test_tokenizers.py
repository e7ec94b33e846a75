"""A tokenizer's own ids under fairseq's own commands, from text to a chat."""

import io
import json
import re

import pytest

from evomoe_plugin.cli import main
from evomoe_plugin.data import load_tokenizer, prepare
from evomoe_plugin.data.progress import Progress
from tests.data import chat_templates
from tests.data.texts import options_for, words
from tests.data.tiny_tokenizers import TEXTS, save
from tests.end_to_end.conftest import TINY
from tests.end_to_end.runs import evaluate, load

CHAT = {
    "conversations": [{"from": "human", "value": "The dog?"}, {"from": "gpt", "value": "The fox."}]
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with a Llama-like tokenizer, and chats in the same folder."""
    root = tmp_path_factory.mktemp("tokenizer")
    texts = root / "texts.txt"
    texts.write_text("\n\n".join([*TEXTS[:-1], *map(words, range(20))]))
    tokenizer = save(root / "model", "llama2", chat_template=chat_templates.INST)
    options = options_for(root, texts, documents_by="blank-line", tokenizer=str(tokenizer))
    prepare(options, Progress(io.StringIO()))
    for split in ("train", "valid"):
        (root / "out" / f"{split}.json").write_text(json.dumps([CHAT] * 9))
    return root / "out"


def options(data, save_dir, task, *given):
    return (
        *(data, "--user-dir", "evomoe_plugin", "--task", task, *TINY, "--decoder-learned-pos"),
        *("--criterion", "moe_cross_entropy", "--tokens-per-sample", "32", "--batch-size", "4"),
        *("--optimizer", "adam", "--lr", "0.003", "--max-update", "4", "--log-format", "json"),
        *("--num-workers", "0", "--no-epoch-checkpoints", "--save-dir", save_dir, *given),
    )


@pytest.fixture(scope="module")
def pretrained(run_command, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, run_command("train", *options(data, folder, "language_modeling"))


def test_embeddings_have_the_ids_and_evaluation_is_that_of_training(pretrained, data):
    folder, run = pretrained
    tokenizer, model = load_tokenizer(data), load(folder / "checkpoint_last.pt")["model"]
    rows = len(model["decoder.embed_tokens.weight"])
    assert rows == -(-(len(tokenizer.tokens) + 1) // 8) * 8
    assert len(model["decoder.embed_positions.weight"]) == 32 + 2
    wanted = run.logged("valid")[-1]["valid_inner_loss"]
    for size in ("1", "8"):
        found = evaluate(data, folder / "checkpoint_last.pt", "--batch-size", size)
        assert found["loss"].item() == pytest.approx(wanted, abs=6e-4)


def test_chats_are_learned_and_continued(pretrained, data, run_command, tmp_path, capsys):
    path = pretrained[0] / "checkpoint_last.pt"
    task = "language_modeling_sft"
    given = ("--finetune-from-model", path, "--lr", "0.01", "--max-update", "40")
    run = run_command("train", *options(data, tmp_path, task, "--pack-examples", *given))
    losses = [record["valid_inner_loss"] for record in run.logged("valid")]
    assert losses[-1] < 0.5
    assert re.search(r"train.json: 9 examples, \d+ response tokens, .* 0 dropped", run.output)
    tuned = str(tmp_path / "checkpoint_last.pt")
    capsys.readouterr()
    assert main(["generate", "--path", tuned, "--prompt", "The dog?", "--chat", "--cpu"]) == 0
    assert capsys.readouterr().out.strip() == "The fox."
