"""Batches by hand: context, targets and token weights."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.sft_dataset import SFTDataset, scoring_examples
from evomoe_plugin.tasks.language_modeling_sft import LanguageModelingSFTTask
from tests.tasks.conftest import PAIRS, lines, pair

EOS, PAD = 2, 1


def batch_of(dataset, *rows):
    return dataset.collater([dataset[row] for row in rows])


def text_of(task, ids):
    """Tokens without padding, as text."""
    words = [task.dictionary[i] for i in ids.tolist() if i != PAD]
    return "".join(words).replace("\u2581", " ")


def test_the_response_and_its_end_are_learned(make_task):
    task = make_task()
    task.load_dataset("train")
    batch = batch_of(task.dataset("train"), 0, 1)
    for row, (prompt, response) in enumerate(PAIRS[:2]):
        source = batch["net_input"]["src_tokens"][row]
        target = batch["target"][row]
        length = int(batch["net_input"]["src_lengths"][row])
        assert text_of(task, source) == f"</s>{prompt}{response}"
        assert text_of(task, target) == f"{response}</s>"
        # Every target is the token that follows, and what is not learned is padding.
        first = length - len(task.encoder.ids(response)) - 1
        assert (target[:first] == PAD).all() and (target[length:] == PAD).all()
        assert target[first : length - 1].equal(source[first + 1 : length])
        assert target[length - 1] == EOS
    assert batch["ntokens"] == sum(len(task.encoder.ids(r)) + 1 for _, r in PAIRS[:2])
    assert (batch["nsentences"], batch["id"].tolist()) == (2, [0, 1])
    assert set(batch["net_input"]) == {"src_tokens", "src_lengths"}  # stock models take these


def test_all_responses_of_a_chat_are_learned(make_task):
    task = make_task()
    task.load_dataset("train")
    batch = batch_of(task.dataset("train"), len(PAIRS))
    assert text_of(task, batch["net_input"]["src_tokens"][0]) == (
        "</s>Be short. User: Hello. Assistant: Hi.</s>User: Is it warm? Assistant: No, it is cold."
    )
    assert text_of(task, batch["target"][0]) == " Hi.</s> No, it is cold.</s>"


def test_a_typed_prompt_is_tokenized_as_in_training(make_task):
    """fairseq-interactive encodes the line as a whole."""
    task = make_task()
    task.load_dataset("train")
    source = batch_of(task.dataset("train"), len(PAIRS))["net_input"]["src_tokens"][0]
    typed = task.encoder.ids("Be short. User: Hello. Assistant:")
    assert source[1 : len(typed) + 1].tolist() == typed.tolist()


def test_train_on_prompt_learns_all(load):
    batch = batch_of(load(train_on_prompt=True), 0, 1)
    source, target = batch["net_input"]["src_tokens"], batch["target"]
    for row, length in enumerate(batch["net_input"]["src_lengths"]):
        assert target[row, : length - 1].equal(source[row, 1:length])
    assert batch["ntokens"] == int(batch["net_input"]["src_lengths"].sum())


def test_tokens_of_responses_weigh_more(load):
    plain, weighted = load(), load(moe_aux_balance_weight=10.0)
    batch = batch_of(weighted, 0, 5)
    weights = batch["net_input"]["token_weights"]
    for row, index in enumerate((0, 5)):
        responses = plain.examples[index].responses > 0
        length = len(responses)
        # The token that stands at a position is the target of the one before.
        wanted = [1.0] + [10.0 if response else 1.0 for response in responses[:-1]]
        assert weights[row, :length].tolist() == wanted
        assert (weights[row, length:] == 0).all()
    assert "token_weights" not in batch_of(plain, 0, 5)["net_input"]


def test_packed_rows_hold_the_rows_of_their_examples(load):
    plain, packed = load(), load(pack_examples=True, moe_aux_balance_weight=3.0)
    assert len(packed) < len(plain) and packed.sizes.max() <= 64
    seen = []
    for index in range(len(packed)):
        row = packed[index]
        for number in range(int(row["segments"].max()) + 1):
            mask = row["segments"] == number
            seen.append((row["source"][mask].tolist(), row["target"][mask].tolist()))
    assert sorted(seen) == sorted(
        (plain[i]["source"].tolist(), plain[i]["target"].tolist()) for i in range(len(plain))
    )
    batch = batch_of(packed, *range(len(packed)))
    whole = batch_of(plain, *range(len(plain)))
    assert batch["ntokens"] == whole["ntokens"]
    assert batch["net_input"]["segments"].shape == batch["target"].shape


def test_what_is_cut_and_dropped_is_logged(with_file, load, caplog):
    # Of one token each: the letters without a space before them.
    folder = with_file(lines(pair("ab", "c"), pair("abcdef", "a"), pair("d", "b")))
    with caplog.at_level(logging.INFO):
        dataset = load(folder, tokens_per_sample=4)
    assert (
        "3 examples, 6 response tokens, 5 prompt tokens; 1 examples cut to 4 tokens, 0 dropped"
        in caplog.text
    )
    assert dataset.sizes.tolist() == [4, 4, 3]
    caplog.clear()
    (folder / "train.jsonl").write_text(lines(pair("ab", "c"), pair("", "a")))
    with caplog.at_level(logging.INFO):
        assert len(load(folder, tokens_per_sample=1)) == 1
    assert "1 examples cut to 1 tokens, 1 dropped" in caplog.text


def test_responses_are_scored_one_by_one(load, dictionary):
    dataset = load()
    divided = scoring_examples(dataset.examples)
    assert len(divided) == len(PAIRS) + 2
    scored = SFTDataset(divided, dictionary, scored=True)
    batch = batch_of(scored, *range(len(scored)))
    found = []
    for row, start in enumerate(batch["start_indices"]):
        target = batch["target"][row]
        assert (target[:start] == PAD).all()
        learned = target[start:]
        count = int((learned != PAD).sum())
        assert (learned[:count] != PAD).all()  # one stretch
        found.append(learned[:count])
    plain = batch_of(dataset, *range(len(dataset)))
    wanted = [row[row != PAD] for row in plain["target"]]
    assert torch.cat(found).equal(torch.cat(wanted))


def test_batches_are_ordered_by_length_and_numpy_alone(load):
    dataset = load()
    orders = []
    for _ in range(2):
        np.random.seed(5)
        orders.append(dataset.ordered_indices().tolist())
    assert orders[0] == orders[1]
    assert sorted(dataset.sizes) == dataset.sizes[orders[0]].tolist()


def without(name):
    return lambda folder: (folder / name).unlink()


def shorter_dictionary(folder):
    lines = (folder / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join(lines[:-30]))


BAD_FOLDERS = {
    "no dictionary": (without("dict.txt"), "has no dict.txt; give a folder with train.jsonl"),
    "no tokenizer": (
        without("sentencepiece.model"),
        r"no tokenizer \(sentencepiece.model, tok",
    ),
    "another dictionary": (shorter_dictionary, "dict.txt: has no '.+', which the tokenizer next"),
    "a foreign tokenizer": (
        lambda folder: (folder / "sentencepiece.model").write_text("x"),
        "not a SentencePiece model",
    ),
    "no train.jsonl": (without("train.jsonl"), "has no train.jsonl, train.json or folder"),
    "a bad line": (
        lambda folder: (folder / "train.jsonl").write_text('{"prompt": 1}'),
        "train.jsonl, line 1: prompt is not a text but a number",
    ),
    "half of GPT-2's files": (
        lambda folder: (
            (folder / "sentencepiece.model").unlink(),
            (folder / "encoder.json").write_text("{}"),
        ),
        "has no vocab.bpe",
    ),
}


@pytest.mark.parametrize("spoil, wrong", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(with_file, load, spoil, wrong):
    folder = with_file(lines(pair("a", " b")))
    spoil(folder)
    with pytest.raises(OptionError, match=wrong):
        load(folder)


BAD_OPTIONS = {
    "no folder": ({"data": "nowhere"}, "DATA nowhere: no such folder"),
    "two folders": ({"data": "a:b"}, "DATA a:b: no such folder"),
    "no data": ({"data": None}, "DATA is missing: give a folder with train.jsonl, valid"),
    "length": ({"tokens_per_sample": 0}, "--tokens-per-sample 0: give 1 or more"),
    "positions": ({"max_target_positions": 32}, "--tokens-per-sample 64: give at most --max-ta"),
    "weight": ({"moe_aux_balance_weight": -1.0}, "--moe-aux-balance-weight -1.0: give a weight"),
    "nan": ({"moe_aux_balance_weight": float("nan")}, "--moe-aux-balance-weight nan: give a we"),
    "bos": ({"add_bos_token": True}, "--add-bos-token True: examples start with </s>, or"),
    "no such template": ({"chat_template": "x"}, "--chat-template x: needs a tokenizer.json, and"),
    "template": ({"user_template": "User"}, "--user-template 'User': give a text that contains {}"),
}


@pytest.mark.parametrize("given, wrong", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(make_task, given, wrong):
    with pytest.raises(OptionError) as error:
        make_task(**given)
    assert str(error.value).startswith(wrong)


def test_a_length_that_leaves_nothing(with_file, load):
    folder = with_file(lines(pair("a b", " c")))
    with pytest.raises(OptionError, match="--tokens-per-sample 1: leaves no response token"):
        load(folder, tokens_per_sample=1)


def test_no_context_window_and_no_prompt_too_long_for_the_model(make_task):
    task = make_task()
    task.load_dataset("train")
    with pytest.raises(OptionError, match="--context-window 8: every response is scored"):
        task.eval_lm_dataloader(task.dataset("train"), context_window=8)
    with pytest.raises(OptionError, match="has 58 tokens, the model 40 positions"):
        task.eval_lm_dataloader(task.dataset("train"), max_positions=40)


@pytest.mark.parametrize("given", [(), ("--pack-examples",), ("--moe-aux-balance-weight", "2")])
def test_a_stock_model_can_do_all_but_two_things(sft_folder, given):
    args = options.parse_args_and_arch(
        options.get_training_parser(),
        [
            str(sft_folder),
            "--task",
            "language_modeling_sft",
            "--arch",
            "transformer_lm",
            "--decoder-layers",
            "1",
            "--decoder-embed-dim",
            "16",
            "--decoder-attention-heads",
            "2",
            "--tokens-per-sample",
            "64",
            *given,
        ],
    )
    cfg = convert_namespace_to_omegaconf(args)
    task = LanguageModelingSFTTask.setup_task(cfg.task)
    if given:
        with pytest.raises(OptionError, match="only MoE architectures support it"):
            task.build_model(cfg.model)
        return
    task.load_dataset("train")
    model, batch = task.build_model(cfg.model), batch_of(task.dataset("train"), 0, 1)
    logits, _ = model(**batch["net_input"])
    assert logits.shape == (*batch["target"].shape, len(task.dictionary))


def test_generation_is_given_prompts(make_task):
    task = make_task()
    task.load_dataset("train")
    given = []
    generator = SimpleNamespace(
        generate=lambda models, sample, **kwargs: given.append((sample["net_input"], kwargs))
    )
    task.inference_step(generator, [], batch_of(task.dataset("train"), 0, 2, 5))
    [(net_input, kwargs)] = given
    prompts = [PAIRS[0][0], PAIRS[2][0], "Be short. User: Hello. Assistant:"]
    assert [text_of(task, row) for row in net_input["src_tokens"]] == [
        f"</s>{prompt}" for prompt in prompts
    ]
    lengths = [len(task.encoder.ids(prompt)) + 1 for prompt in prompts]
    assert net_input["src_lengths"].tolist() == lengths
    assert kwargs["prefix_tokens"].equal(net_input["src_tokens"][:, 1:])
    assert kwargs["bos_token"] == EOS


@pytest.mark.parametrize("option", ["pack_examples", "train_on_prompt"])
def test_generation_needs_a_prompt_a_row(make_task, option):
    task = make_task(**{option: True})
    task.load_dataset("train")
    flag = "--" + option.replace("_", "-")
    with pytest.raises(OptionError, match=f"{flag} True: .*omit it"):
        task.inference_step(None, [], batch_of(task.dataset("train"), 0))
