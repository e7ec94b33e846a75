"""`evomoe prepare --glue`: a task of GLUE (arXiv 1804.07461) to a data folder for
`--task sentence_prediction`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evomoe_plugin
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.card import DataCard
from evomoe_plugin.data.few_files import prepare_files
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.progress import Progress
from evomoe_plugin.data.tokenizers import has_tokenizer, load_tokenizer


@dataclass(frozen=True)
class GlueTask:
    """Columns of the files, by their names in GLUE's TSV and in Parquet, and how it is scored."""

    sentences: tuple[tuple[str, ...], ...]
    """Names of the columns of each sentence."""
    label: tuple[str, ...]
    classes: tuple[str, ...] | None = ("0", "1")
    """In the order of their numbers; None: a score from 0 to 5."""
    metric: str = "accuracy"
    """That the benchmark reports, as fairseq logs it."""
    report: str | None = None
    """Flag of the criterion that computes it."""
    headless: tuple[str, ...] | None = None
    """Columns of train and dev files without a header."""

    @property
    def flags(self) -> list[str]:
        """Of fairseq-train."""
        flags = [f"--num-classes {1 if self.classes is None else len(self.classes)}"]
        flags += ["--regression-target"] * (self.classes is None)
        flags += [self.report] if self.report else []
        return [
            *flags,
            f"--best-checkpoint-metric {self.metric}",
            "--maximize-best-checkpoint-metric",
        ]


_TWO = (("sentence1",), ("sentence2",))
_ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask(
        (("sentence",),),
        ("label",),
        metric="mcc",
        report="--report-mcc",
        headless=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask((("sentence",),), ("label",)),
    "mrpc": GlueTask(
        (("#1 String", "sentence1"), ("#2 String", "sentence2")),
        ("Quality", "label"),
        metric="acc_and_f1",
        report="--report-acc-and-f1",
    ),
    "stsb": GlueTask(
        _TWO,
        ("score", "label"),
        classes=None,
        metric="pearson_and_spearman",
        report="--report-pearson-and-spearman",
    ),
    "qqp": GlueTask(
        (("question1",), ("question2",)),
        ("is_duplicate", "label"),
        metric="acc_and_f1",
        report="--report-acc-and-f1",
    ),
    "mnli": GlueTask(
        (("sentence1", "premise"), ("sentence2", "hypothesis")),
        ("gold_label", "label"),
        classes=("entailment", "neutral", "contradiction"),
    ),
    "qnli": GlueTask((("question",), ("sentence",)), ("label",), classes=_ENTAILS),
    "rte": GlueTask(_TWO, ("label",), classes=_ENTAILS),
}

# Splits of fairseq and the starts of the files' names; mismatched ones of MNLI are second splits.
SPLITS = {
    "train": ("train",),
    "valid": ("dev_matched", "validation_matched", "dev", "validation"),
    "valid1": ("dev_mismatched", "validation_mismatched"),
    "test": ("test_matched", "test"),
    "test1": ("test_mismatched",),
}
_HIGHEST_SCORE = 5.0  # of STS-B; fairseq's recipe trains on scores from 0 to 1


@dataclass(frozen=True)
class GlueOptions:
    """A task of GLUE, its files, and the data that the model was trained with."""

    glue: tuple[str, str]
    """Task and folder."""
    out: str
    tokenizer_of: str | None = None
    source: str = ""
    overwrite: bool = False

    @property
    def task(self) -> GlueTask:
        return TASKS[self.glue[0]]

    def recorded(self) -> dict[str, Any]:
        """The options that change the result, as JSON values."""
        return {"glue": self.glue[0], "source": self.source}

    def validate(self) -> None:
        """Raise `OptionError` for the first invalid value."""
        name, folder = self.glue
        if name not in TASKS:
            raise OptionError("glue", name, f"one of: {', '.join(TASKS)}")
        if not Path(folder).is_dir():
            raise OptionError("glue", folder, "no such folder; give the one with the task's files")
        data = self.tokenizer_of
        if data is None:
            raise OptionError(
                "tokenizer_of", "(not given)", "give the folder that the model was trained with"
            )
        if not (Path(data) / "dict.txt").is_file() or not has_tokenizer(Path(data)):
            raise OptionError(
                "tokenizer_of", data, "has no dict.txt and tokenizer: give one of evomoe prepare"
            )


class GlueCard(DataCard):
    """The card of a folder for sentence prediction."""

    @property
    def usage(self) -> str:
        ids, task = self.tokenizer["special"], TASKS[self.options["glue"]]
        return f"""\
    fairseq-train DATA --task sentence_prediction --user-dir evomoe_plugin \\
        --init-token {ids["bos"]} --separator-token {ids["eos"]} \\
        {" ".join(task.flags)} \\
        --restore-file PRETRAINED --reset-optimizer --reset-dataloader --reset-meters \\
        --criterion moe_sentence_prediction --arch …"""


def prepare_glue(options: GlueOptions, progress: Progress | None = None) -> DataCard:
    """Write `options.out` and return its card.

    Each sentence is a data set of its own, `input0` and `input1`, with the dictionary of the
    pretrained model; `label` has the numbers of the classes, or a line with a score from 0 to 1 for
    each example. Files without labels, as of the test split, give none.

    Raises OptionError for bad input, RunFailed if the disk is full. In any case `options.out` is a
    complete data set, the old or the new one, or does not exist.
    """
    options.validate()
    progress = progress or Progress()
    files = _files(Path(options.glue[1]))
    if not {"train", "valid"} <= files.keys():
        missing = "train" if "train" not in files else "dev or validation"
        raise OptionError("glue", options.glue[1], f"has no {missing} file (.tsv or .parquet)")
    named = [*files.items(), (None, Path(str(options.tokenizer_of)) / "dict.txt")]
    return prepare_files(
        options, named, GlueCard, lambda folder: _write(options, files, folder, progress), progress
    )


def _files(folder: Path) -> dict[str, Path]:
    """The file of each split that the folder has."""
    found = {}
    paths = sorted([*folder.glob("*.tsv"), *folder.glob("*.parquet")])
    for split, starts in SPLITS.items():
        for start in starts:
            chosen = [p for p in paths if p.stem == start or p.stem.startswith(f"{start}-")]
            if len(chosen) > 1:
                raise OptionError(
                    "glue", folder, f"has {len(chosen)} files of {start}: keep one in the folder"
                )
            if chosen:
                found[split] = chosen[0]
                break
    return found


def _write(
    options: GlueOptions,
    files: dict[str, Path],
    folder: OutputFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Write the data set; the fields of the card (`few_files.prepare_files`)."""
    evomoe_plugin.register()
    import torch
    from fairseq.data import indexed_dataset

    from evomoe_plugin.data.dictionary import dictionary_ids, load_dictionary

    task, data = options.task, Path(str(options.tokenizer_of))
    tokenizer = load_tokenizer(data)
    dictionary = load_dictionary("tokenizer_of", data / "dict.txt")
    ids = dictionary_ids(tokenizer, dictionary)
    names = [f"input{i}" for i in range(len(task.sentences))]
    for name in names:
        (folder.data / name).mkdir()
        dictionary.save(str(folder.data / name / "dict.txt"))
    (folder.data / "label").mkdir()
    labels = _label_dictionary(task)
    if task.classes is not None:
        labels.save(str(folder.data / "label" / "dict.txt"))

    def builder(path: Path, size: int) -> Any:
        return indexed_dataset.make_builder(indexed_dataset.data_file_path(str(path)), "mmap", size)

    splits, skipped = {}, 0
    with progress.stage("glue") as message:
        for split, file in files.items():
            prefixes = [folder.data / name / split for name in names]
            builders = [builder(prefix, len(dictionary)) for prefix in prefixes]
            found: list[str] = []
            counts = dict.fromkeys(("documents", "items", "bytes", "tokens", "unknown_tokens"), 0)
            for sentences, label in read_examples(file, task):
                if sentences is None:
                    skipped += 1
                    continue
                for sentence, out in zip(sentences, builders, strict=True):
                    row = ids[tokenizer.encode(sentence)].tolist()
                    counts["tokens"] += len(row) + 1
                    counts["bytes"] += len(sentence.encode())
                    counts["unknown_tokens"] += row.count(dictionary.unk())
                    out.add_item(torch.tensor([*row, dictionary.eos()], dtype=torch.int32))
                counts["documents"] += 1
                if label is not None:
                    found.append(label)
            counts["items"] = len(names) * counts["documents"]
            for out, prefix in zip(builders, prefixes, strict=True):
                out.finalize(indexed_dataset.index_file_path(str(prefix)))
            if found and len(found) != counts["documents"]:
                raise OptionError("glue", file, "some of its examples have no label")
            if not counts["documents"] or (split in ("train", "valid") and not found):
                raise OptionError("glue", file, "has no examples with labels")
            if found and task.classes is None:
                text = "".join(f"{label}\n" for label in found)
                (folder.data / "label" / f"{split}.label").write_text(text)
            elif found:
                prefix = folder.data / "label" / split
                out = builder(prefix, len(labels))
                for label in found:
                    row = [labels.index(label), labels.eos()]
                    out.add_item(torch.tensor(row, dtype=torch.int32))
                out.finalize(indexed_dataset.index_file_path(str(prefix)))
            splits[split] = counts
        sizes = ", ".join(f"{of['documents']:,} {split}" for split, of in splits.items())
        message.append(f"examples: {sizes}; {skipped:,} incomplete rows skipped")
    return {
        "tokenizer": {
            "kind": tokenizer.kind,
            "rows": len(dictionary),
            "lossless": tokenizer.lossless,
            "flags": [],
            "special": {"bos": dictionary.bos(), "eos": dictionary.eos()},
        },
        "splits": splits,
        "empty_documents": skipped,
    }


def _label_dictionary(task: GlueTask) -> Any:
    """fairseq's dictionary of the classes' numbers, in their order."""
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    for n in range(len(task.classes or ())):
        dictionary.add_symbol(str(n))
    return dictionary


def read_examples(
    file: Path, task: GlueTask
) -> Iterator[tuple[tuple[str, ...] | None, str | None]]:
    """Sentences and label of each row; None for a row with too few columns.

    A label is the number of the class, or a score from 0 to 1; None: the file has none.

    Raises:
        OptionError: the file lacks a column, or a label is none of the task's.
    """
    rows = _parquet_rows(file) if file.suffix == ".parquet" else _tsv_rows(file, task)
    columns = next(rows)
    places = [_place(file, columns, names) for names in task.sentences]
    at = next((columns.index(name) for name in task.label if name in columns), None)
    if at is None and not file.stem.startswith("test"):
        raise OptionError("glue", file, f"has no column {task.label[0]}")
    for number, row in enumerate(rows, start=1):
        if len(row) < len(columns):
            yield None, None
            continue
        label = None if at is None else _label(file, number, task, row[at])
        yield tuple(row[place] for place in places), label


def _place(file: Path, columns: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in columns:
            return columns.index(name)
    raise OptionError("glue", file, f"has no column {names[0]}; its columns: {', '.join(columns)}")


def _label(file: Path, number: int, task: GlueTask, value: str) -> str | None:
    if task.classes is None:
        try:
            score = float(value) / _HIGHEST_SCORE
        except ValueError:
            raise OptionError("glue", file, f"row {number}: {value!r} is no score") from None
        return None if score < 0 else repr(score)  # -1: `datasets` has no label for the test split
    if value == "-1":
        return None
    if value in task.classes:
        return str(task.classes.index(value))
    if value.isdecimal() and int(value) < len(task.classes):
        return value
    raise OptionError(
        "glue", file, f"row {number}: {value!r} is no label; one of: {', '.join(task.classes)}"
    )


def _tsv_rows(file: Path, task: GlueTask) -> Iterator[list[str]]:
    """The names of the columns, then the rows."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if task.headless is not None and not file.stem.startswith("test"):
            yield list(task.headless)
        try:
            yield from rows
        except UnicodeDecodeError as error:
            raise OptionError("glue", file, f"is not UTF-8 ({error.reason})") from None


def _parquet_rows(file: Path) -> Iterator[list[str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        yield list(table.schema_arrow.names)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield [str(value) for value in row.values()]
    except pa.ArrowInvalid as error:
        raise OptionError("glue", file, f"is no Parquet file ({str(error)[:100]})") from None
