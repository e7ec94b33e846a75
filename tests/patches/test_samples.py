"""Which samples are evaluated and trained on: none is left out without a word, whatever their size,
and contexts depend on the data alone."""

import argparse
import re

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, MonolingualDataset, TokenBlockDataset
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from evomoe_plugin.config.errors import RunFailed


def dictionary_of_words(count=20):
    dictionary = Dictionary()
    for n in range(count):
        dictionary.add_symbol(f"w{n}")
    return dictionary


def task_of(**given):
    defaults = {f: getattr(LanguageModelingConfig(), f) for f in ("seed", "add_bos_token")}
    return LanguageModelingTask(argparse.Namespace(**{**defaults, **given}), dictionary_of_words())


def dataset_of(task, lengths):
    """Documents of consecutive numbers, so that every token says where it is."""
    count = sum(lengths)
    documents = torch.arange(4, 4 + count).split(lengths)
    blocks = TokenBlockDataset(
        list(documents),
        np.array(lengths),
        task.args.tokens_per_sample,
        pad=task.dictionary.pad(),
        eos=task.dictionary.eos(),
        break_mode=task.args.sample_break_mode,
        include_targets=True,
    )
    return MonolingualDataset(
        blocks, blocks.sizes, task.dictionary, shuffle=True, targets=["future"]
    )


LONG = [9] * 9 + [3] * 91
CASES = [
    (
        "eos",
        [9, 9],
        {"max_positions": 4},
        "2 of 2 samples, with 18 of 18 tokens, are longer than 4 tokens; at most 10% of a data set "
        "may be left out: give --sample-break-mode none, which divides documents, or "
        "--shorten-method truncate",
    ),
    (
        "none",
        [16, 2],
        {"max_positions": 4},
        "2 of 3 samples, with 16 of 18 tokens, are longer than 4 tokens; at most 10% of a data set "
        "may be left out: give --tokens-per-sample 4 or less, the model's positions",
    ),
    (
        "none",
        [80],
        {"max_positions": 8, "max_tokens": 7},
        "10 of 10 samples, with 80 of 80 tokens, are longer than 7 tokens; at most 10% of a data "
        "set may be left out: give --max-tokens 8 or more",
    ),
    # Few samples that have much of the text.
    ("eos", LONG, {"max_positions": 8}, "9 of 100 samples, with 81 of 354 tokens, are longer than"),
    (
        "eos",
        [9] + [8] * 99,
        {"max_positions": 8, "ignore_invalid_inputs": False},
        "1 of 100 samples, with 9 of 801 tokens, are longer than 8 tokens: give "
        "--sample-break-mode none, which divides documents, or --shorten-method truncate, or leave "
        "them out by --skip-invalid-size-inputs-valid-test",
    ),
]


@pytest.mark.parametrize("mode, lengths, given, message", CASES, ids=[c[3][:30] for c in CASES])
def test_too_many_long_samples_are_refused(mode, lengths, given, message):
    task = task_of(tokens_per_sample=8, sample_break_mode=mode)
    dataset = dataset_of(task, lengths)
    # By default in training and in fairseq-eval-lm, which would go on with the rest.
    given = {"ignore_invalid_inputs": True, "max_sentences": 2, **given}
    with pytest.raises(RunFailed, match=re.escape(message)) as raised:
        task.get_batch_iterator(dataset, required_batch_size_multiple=8, **given)
    assert raised.value.exit_status == 1


def test_few_long_samples_are_counted(caplog):
    task = task_of(tokens_per_sample=8, sample_break_mode="eos")
    dataset = dataset_of(task, [9] + [8] * 99)
    batches = task.get_batch_iterator(
        dataset, max_positions=8, max_sentences=4, ignore_invalid_inputs=True
    ).frozen_batches
    assert sorted(np.concatenate(batches)) == list(range(1, 100))
    assert (
        "1 of 100 samples, with 9 of 801 tokens, are longer than 8 tokens and are left out"
        in caplog.text
    )


def test_a_long_document_keeps_its_size():
    """65,546 in sixteen bits is 10."""
    task = task_of(tokens_per_sample=8, sample_break_mode="eos")
    assert dataset_of(task, [65546, 5]).sizes.tolist() == [65546, 5]


# --- contexts


def evaluated(task, dataset, context_window, num_workers=0, num_shards=1, **given):
    """By sample: the row of tokens that the model reads, and those of them that are scored."""
    rows = {}
    for shard in range(num_shards):
        batches = task.eval_lm_dataloader(
            dataset=dataset,
            context_window=context_window,
            num_workers=num_workers,
            num_shards=num_shards,
            shard_id=shard,
            **given,
        )
        for batch in batches:
            if not batch:
                continue
            tokens, target = batch["net_input"]["src_tokens"], batch["target"]
            assert batch["ntokens"] == int(target.ne(task.dictionary.pad()).sum())
            for i, number in enumerate(batch["id"].tolist()):
                own = target[i, batch["start_indices"][i] :]
                assert target[i].ne(task.dictionary.pad()).sum() == own.ne(1).sum()
                rows[number] = tokens[i][tokens[i] != 1].tolist(), own[own != 1].tolist()
    return rows


@pytest.mark.parametrize("window", [1, 5, 16])
def test_a_context_is_the_text_before_the_sample(window):
    task = task_of(tokens_per_sample=3, sample_break_mode="none")
    text = list(range(4, 54))  # 17 samples, the last of 2
    rows = evaluated(task, dataset_of(task, [30, 20]), window, batch_size=2)
    assert sorted(rows) == list(range(17))
    for number, (row, scored) in rows.items():
        first = 3 * number
        assert scored == text[first : first + 3]
        # Inputs are the text one token earlier, the first of a document an end of sentence.
        wanted = [2, *text][max(0, first - window) : first + len(scored)]
        assert [2 if token == 33 else token for token in row] == [
            2 if token == 33 else token for token in wanted
        ]


@pytest.mark.parametrize(
    "given",
    [
        {"num_workers": 2},
        {"num_shards": 3},
        {"batch_size": 5},
        {"num_workers": 2, "num_shards": 2, "batch_size": 1},
    ],
    ids=str,
)
def test_a_context_depends_on_nothing_but_the_data(given):
    task = task_of(tokens_per_sample=3, sample_break_mode="none")
    wanted = evaluated(task, dataset_of(task, [30, 20]), 5, batch_size=2)
    assert evaluated(task, dataset_of(task, [30, 20]), 5, **{"batch_size": 2, **given}) == wanted


def test_long_documents_leave_room_for_less_context():
    task = task_of(tokens_per_sample=3, sample_break_mode="eos")
    rows = evaluated(task, dataset_of(task, [4, 6, 2, 9]), 5, batch_size=1)
    assert [len(row) for row, _ in rows.values()] == [4, 8, 7, 9]
    assert [len(scored) for _, scored in rows.values()] == [4, 6, 2, 9]
