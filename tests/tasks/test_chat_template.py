"""Fine-tuning with a tokenizer of Hugging Face: its ids and chat template; formats of others."""

import functools
import json
import types

import pyarrow as pa
import pytest
import torch

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.dictionary import TokenizerDictionary
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_files
from evomoe_plugin.data.sft_dataset import scoring_examples
from tests.data import chat_templates
from tests.data.test_sft_files import save_to_disk
from tests.data.tiny_tokenizers import gpt2, save

CHAT = [
    {"from": "system", "value": "Be short."},
    {"from": "human", "value": "The dog?"},
    {"from": "gpt", "value": "The lazy dog."},
    {"from": "human", "value": "The </s> fox?"},
    {"from": "gpt", "value": "The fox."},
]
MESSAGES = [
    {"role": {"human": "user", "gpt": "assistant"}.get(t["from"], t["from"]), "content": t["value"]}
    for t in CHAT
]
ALPACA = {"instruction": "The dog?", "input": "Quick.", "output": " The dog."}


def write(folder, kind="llama2", records=({"conversations": CHAT}, ALPACA), **config):
    """A folder to fine-tune on, as from `prepare`."""
    save(folder, kind, **config)
    tokenizer = HuggingFaceTokenizer(tokenizer_files(str(folder)))
    counts = [1] * (len(tokenizer.tokens) + 1)
    TokenizerDictionary.of(tokenizer, counts, None).save(str(folder / "dict.txt"))
    (folder / "train.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture
def make_task(make_task):
    """The task with rows that no chat here is cut to: these tokenizers know few words."""
    return functools.partial(make_task, tokens_per_sample=256)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", chat_template=chat_templates.INST)


@pytest.fixture
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def row(dataset, n=0):
    """Source and target of an example, and the targets that are learned, in runs."""
    batch = dataset.collater([dataset[n]])
    return batch["net_input"]["src_tokens"][0], batch["target"][0]


def learned(target, pad):
    runs, before = [], pad
    for token in target.tolist():
        if token != pad:
            if before == pad:
                runs.append([])
            runs[-1].append(token)
        before = token
    return runs


def test_rows_are_what_transformers_makes_of_chats(folder, load, make_task, theirs):
    dataset, pad = load(folder), make_task(folder).dictionary.pad()
    ids = theirs.apply_chat_template(MESSAGES, return_dict=False)
    source, target = row(dataset)
    assert source.tolist() == ids[:-1]
    assert torch.where(target == pad, target, torch.tensor(ids[1:])).equal(target)
    runs = [theirs.decode(run) for run in learned(target, pad)]
    assert runs == ["The lazy dog. </s>", "The fox. </s>"]
    assert target[-1] == 2
    # Every example of a data set in another format is that of its messages.
    asked = [{"role": "user", "content": "The dog?\nQuick."}]
    ids = theirs.apply_chat_template(
        [*asked, {"role": "assistant", "content": " The dog."}], return_dict=False
    )
    assert row(dataset, 1)[0].tolist() == ids[:-1]
    assert (
        row(load(folder, train_on_prompt=True))[1].tolist()
        == (theirs.apply_chat_template(MESSAGES, return_dict=False)[1:])
    )


def test_each_response_is_scored_after_its_own_start(folder, load):
    dataset = load(folder)
    whole = dataset.examples[0]
    first, second, _ = scoring_examples(dataset.examples)
    assert {first.start, second.start} == {whole.start} == {1}
    assert second.tokens.tolist() == whole.tokens.tolist()
    assert first.tokens.tolist() == whole.tokens[: len(first)].tolist()


@pytest.mark.parametrize("kind, start", [("llama2", "<s>"), ("gpt2", "<|endoftext|>")])
def test_without_a_template_roles_have_theirs(tmp_path, load, make_task, kind, start):
    records = [{"messages": MESSAGES}, {"prompt": "The dog", "response": " is </s> lazy."}]
    folder = write(tmp_path / "data", kind, records)
    dataset, task = load(folder), make_task(folder)
    tokenizer, eos, pad = task.encoder.tokenizer, task.dictionary.eos(), task.dictionary.pad()
    first, second = (
        "Be short. User: The dog? Assistant: The lazy dog.",
        "User: The </s> fox? Assistant: The fox.",
    )
    source, target = row(dataset)
    begin = tokenizer._tokenizer.token_to_id(start)
    wanted = [begin, *tokenizer.encode(first), eos, *tokenizer.encode(second), eos]
    assert source.tolist() == wanted[:-1]  # special tokens in a text are text
    runs = learned(target, pad)
    assert [tokenizer.decode(run[:-1]).strip() for run in runs] == ["The lazy dog.", "The fox."]
    assert {run[-1] for run in runs} == {eos}
    source, target = row(dataset, 1)
    assert source.tolist() == [begin, *tokenizer.encode("The dog is </s> lazy.")]
    folder = write(tmp_path / "other", kind, records, chat_template=chat_templates.CHATML)
    assert row(load(folder, chat_template="none"))[0].tolist() == wanted[:-1]


def test_a_template_of_ones_own(folder, load, tmp_path, make_task):
    path = tmp_path / "own.jinja"
    path.write_text(chat_templates.MARKED)
    dataset, task = load(folder, chat_template=str(path)), make_task(folder)
    runs = learned(row(dataset)[1], task.dictionary.pad())
    decode = task.encoder.tokenizer.decode
    assert [decode(run).strip() for run in runs] == ["The lazy dog.</s>", "The fox.</s>"]
    # There is a start of its own only where the template writes one.
    assert row(dataset)[0][0] == task.encoder.ids("system")[0]


def test_a_folder_of_datasets(folder, load):
    before = row(load(folder))[0].tolist()
    (folder / "train.json").unlink()
    save_to_disk(folder / "train", [pa.table({"conversations": [CHAT], "id": [1]})])
    dataset = load(folder)
    assert (len(dataset), row(dataset)[0].tolist()) == (1, before)


BAD = {
    "fails": ("{{ raise_exception('no') }}", r"train.json, record 1: fails: TemplateError: no"),
    "runs code": ("{{ ''.__class__.__mro__ }}", "record 1: fails: SecurityError: access to attri"),
}


@pytest.mark.parametrize("case", BAD)
def test_templates_that_fail(tmp_path, load, case):
    source, wrong = BAD[case]
    folder = write(tmp_path / "data", chat_template=source)
    with pytest.raises(OptionError, match=f"--chat-template of {folder}: .*{wrong}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_options_that_contradict_it(folder, make_task, tmp_path):
    with pytest.raises(OptionError, match="--user-template 'Q: {}': chats are written by the chat"):
        make_task(folder, user_template="Q: {}")
    make_task(folder, user_template="Q: {}", chat_template="none")
    make_task(folder, prompt_template="Q: {}")
    with pytest.raises(OptionError, match="--chat-template .*no.jinja: cannot be read: No such"):
        make_task(folder, chat_template=str(tmp_path / "no.jinja"))


def test_the_tokenizer_is_that_of_the_dictionary(folder, make_task):
    tokenizer, _ = gpt2()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(OptionError, match="dict.txt: has other special tokens than the tokenizer"):
        make_task(folder)


def test_generation_starts_as_the_chat_does(folder, make_task, theirs):
    task = make_task(folder)
    task.load_dataset("train")
    dataset, given = task.dataset("train"), []
    generator = types.SimpleNamespace(
        generate=lambda models, sample, **kwargs: given.append((sample["net_input"], kwargs))
    )
    task.inference_step(generator, [], dataset.collater([dataset[0], dataset[1]]))
    [(net_input, kwargs)] = given
    prompts = [
        theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in (MESSAGES[:2], [{"role": "user", "content": "The dog?\nQuick."}])
    ]
    assert [length.item() for length in net_input["src_lengths"]] == list(map(len, prompts))
    for found, wanted in zip(net_input["src_tokens"], prompts, strict=True):
        assert found[: len(wanted)].tolist() == wanted
    assert kwargs["bos_token"] == 1
    assert kwargs["prefix_tokens"].equal(net_input["src_tokens"][:, 1:])


def test_prompts_that_end_a_text_are_refused(tmp_path, make_task):
    marks = {"eos_token": "<|eot_id|>", "chat_template": chat_templates.HEADERS}
    task = make_task(write(tmp_path / "data", "llama3", **marks))
    task.load_dataset("train")
    batch = task.dataset("train").collater([task.dataset("train")[0]])
    with pytest.raises(OptionError, match="prompts contain <.eot_id.>, where fairseq's generator"):
        task.inference_step(None, [], batch)
