"""`evomoe prepare --glue`: each task's files, as GLUE and `datasets` write them."""

import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from evomoe_plugin.cli import main
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.glue import TASKS, read_examples

TSV = {
    "cola": ("gj04\t1\t\tA b.\ngj04\t0\t*\tC \"d.\n", [(("A b.",), "1"), (('C "d.',), "0")]),
    "sst2": ("sentence\tlabel\nfine \t1\n", [(("fine ",), "1")]),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n", [(("a", "b"), "1")]),
    "stsb": ("index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.500\n", [(("a", "b"), "0.5")]),
    "qqp": (
        "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t0\n1\tc\n",
        [(("a", "b"), "0"), (None, None)],
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tcontradiction\n",
        [(("a", "b"), "2")],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\ta\tb\tnot_entailment\n", [(("a", "b"), "1")]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", [(("a", "b"), "0")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_files_of_every_task(tmp_path, name):
    text, wanted = TSV[name]
    (tmp_path / "dev.tsv").write_text(text)
    assert list(read_examples(tmp_path / "dev.tsv", TASKS[name])) == wanted
    columns = {names[-1]: ["a"] for names in TASKS[name].sentences}
    label = 2.5 if TASKS[name].classes is None else 1
    table = pa.table({**columns, "label": [label], "idx": [0]})
    parquet.write_table(table, tmp_path / "validation-0.parquet")
    ((sentences, found),) = read_examples(tmp_path / "validation-0.parquet", TASKS[name])
    assert sentences == ("a",) * len(columns) and float(found) == (0.5 if label == 2.5 else 1)


def test_test_splits_have_no_labels(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta b\n")
    assert list(read_examples(tmp_path / "test.tsv", TASKS["cola"])) == [(("a b",), None)]
    parquet.write_table(pa.table({"sentence": ["a"], "label": [-1]}), tmp_path / "test-0.parquet")
    assert list(read_examples(tmp_path / "test-0.parquet", TASKS["sst2"])) == [(("a",), None)]


def test_bad_files(tmp_path):
    for text, message in (
        ("sentence\tlabel\na\t2\n", "row 1: '2' is no label; one of: 0, 1"),
        ("text\tlabel\na\t1\n", "has no column sentence; its columns: text, label"),
        ("sentence\ttag\na\t1\n", "has no column label"),
    ):
        (tmp_path / "train.tsv").write_text(text)
        with pytest.raises(OptionError, match=message):
            list(read_examples(tmp_path / "train.tsv", TASKS["sst2"]))


def test_bad_commands(tmp_path, capsys):
    folder, out = tmp_path / "cola", tmp_path / "out"
    folder.mkdir()
    for words, message in (
        (("cola", folder), "--tokenizer-of .*: give the folder that the model was trained with"),
        (("cola", folder, "--tokenizer-of", folder), "has no dict.txt and tokenizer"),
        (("wnli", folder, "--tokenizer-of", folder), "--glue wnli: one of: cola, sst2"),
        (("cola", tmp_path / "none", "--tokenizer-of", folder), "no such folder"),
        (("cola", folder, "--vocab-size", "9"), "--vocab-size 9: is not of --glue: leave it out"),
    ):
        assert main(["prepare", "--glue", *map(str, words), "--out", str(out)]) == 2
        printed = capsys.readouterr().err
        assert re.search(message, printed), printed
        assert not out.exists()
    assert main(["prepare", "x", "--tokenizer-of", "y", "--out", str(out)]) == 2
    assert "--tokenizer-of y: is of parallel text or GLUE" in capsys.readouterr().err
