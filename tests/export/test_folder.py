"""The exported folder: loading without this package, tokenizers, and atomic writing."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.export import folder as folder_module
from evomoe_plugin.export.folder import export
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.generation.text import TextCodec
from tests.data import chat_templates
from tests.data.conftest import gpt2_files  # noqa: F401  a fixture
from tests.data.conftest import trained as prepared  # noqa: F401  a fixture
from tests.data.texts import ODD, options_for
from tests.data.texts import words as some_words
from tests.data.tiny_tokenizers import KINDS
from tests.data.tiny_tokenizers import TEXTS as TEXTS_OF_SCRIPTS
from tests.tasks.test_chat_template import write

ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("evomoe_plugin", "fairseq", "fairscale"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("w1 w2 w35 w7", return_tensors="pt")
with torch.no_grad():
    torch.save({"ids": ids["input_ids"], "logits": model(**ids).logits,
                "generated": model.generate(**ids, max_new_tokens=6, do_sample=False)}, out)
"""


@pytest.mark.parametrize(
    "gate",
    [
        pytest.param("dense_to_sparse", marks=pytest.mark.distributed),
        *(pytest.param(gate, marks=pytest.mark.slow) for gate in ("top_k", "hash")),
    ],
)
@torch.no_grad()
def test_in_a_process_that_cannot_import_us(make_trained, tmp_path, gate):
    trained = make_trained(20, moe_gate=gate)
    export(trained, str(tmp_path / "exported"))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "exported"), str(tmp_path / "out.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    ids = [2, *trained.codec.encode("w1 w2 w35 w7")]
    assert got["ids"].tolist() == [ids]
    assert torch.allclose(got["logits"], trained.model(torch.tensor([ids]))[0], atol=1e-5)
    assert got["generated"].size(1) == 11 or got["generated"][0, -1] == 2


def with_data(trained, folder):
    """The same model with the folder's dictionary, to test its tokenizer."""
    dictionary = load_dictionary("data", folder / "dict.txt")
    return TrainedModel(
        trained.model, trained.cfg, dictionary, TextCodec(folder, dictionary), folder
    )


TEXTS = [
    "",
    " ",
    "a",
    ODD,
    some_words(3),
    " two  spaces ",
    "</s> is text, <unk> too",
    "tab\tand\n\n",
    "\u2581 \u3000 é 😀",
    "the end</s>",
]


@pytest.fixture
def gpt2_folder(tmp_path, gpt2_files):  # noqa: F811
    return prepare_with(tmp_path, gpt2_bpe=tuple(map(str, gpt2_files)))


FOLDERS = {"sentencepiece": "prepared", "unigram": "unigram_folder", "gpt2": "gpt2_folder"}


@pytest.mark.parametrize(
    "kind, start",
    [("sentencepiece", "</s>"), ("sentencepiece", "<s>"), ("unigram", "<s>"), ("gpt2", "</s>")],
)
def test_the_tokenizer_gives_the_same_ids(
    make_trained, tmp_path, transformers, request, kind, start
):
    folder = request.getfixturevalue(FOLDERS[kind])
    trained = with_data(make_trained(start=start), folder)
    done = export(trained, str(tmp_path / "exported"))
    has_code = kind == "unigram"  # with equally probable ways to divide some texts
    assert bool(done.tokenizer_code) == has_code
    assert (tmp_path / "exported/tokenizer.json").exists() != has_code
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "exported", trust_remote_code=has_code
    )
    first = trained.dictionary.index(start)
    for text in TEXTS:
        ids = trained.codec.encode(text)
        assert tokenizer(text)["input_ids"] == [first, *ids]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([first, *ids, 2], skip_special_tokens=True) == text
    assert (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    ) == (first, 2, 1, 3)
    batch = tokenizer(["a b", "a b a b a b a b"], padding=True)
    assert batch["input_ids"][0][-1] == 1
    assert batch["attention_mask"][0][-1] == 0
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "again", trust_remote_code=has_code
    )
    assert again(ODD)["input_ids"] == tokenizer(ODD)["input_ids"]


def prepare_with(tmp_path, **given):
    from evomoe_plugin.data import prepare
    from evomoe_plugin.data.progress import Progress

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_words(n) for n in range(20)))
    options = options_for(tmp_path, text, documents_by="blank-line", **given)
    prepare(options, Progress(open(os.devnull, "w")))
    return tmp_path / "out"


SPM = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "bos_id": -1,
    "eos_id": -1,
}


def sentencepiece_model(path, **given):
    import sentencepiece

    text, model = "\n".join(map(some_words, range(50))), io.BytesIO()
    text += "\n" + "".join(map(chr, range(32, 127)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=400,
        num_threads=1,
        minloglevel=3,
        **given,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def unigram_folder(tmp_path):
    model = sentencepiece_model(tmp_path / "unigram.model", model_type="unigram", **SPM)
    return prepare_with(tmp_path, sentencepiece_model=str(model))


@pytest.mark.parametrize(
    "given, why",
    [
        # As Llama 2, and with SentencePiece's defaults: NFKC, spaces joined, no byte fallback.
        ({"byte_fallback": True, "normalization_rule_name": "identity"}, None),
        ({}, None),
        ({**SPM, "user_defined_symbols": ["ab"]}, "it has user-defined pieces"),
        ({**SPM, "treat_whitespace_as_suffix": True}, "its pieces end with spaces"),
    ],
)
def test_sentencepiece_models_of_others(make_trained, tmp_path, transformers, given, why):
    model = sentencepiece_model(tmp_path / "bpe.model", model_type="bpe", **given)
    folder = prepare_with(tmp_path, sentencepiece_model=str(model))
    trained = with_data(make_trained(), folder)
    done = export(trained, str(tmp_path / "exported"))
    assert (done.tokenizer_code or "").startswith(why or "")
    assert (done.tokenizer_code is None) == (why is None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "exported", trust_remote_code=why is not None
    )
    for text in TEXTS + TEXTS_OF_SCRIPTS:
        ids = trained.codec.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        if 3 not in ids:
            assert tokenizer.decode(ids) == trained.codec.decode(ids)


def test_without_protobuf_a_sentencepiece_model_runs_in_code(
    make_trained,
    tmp_path,
    monkeypatch,
    prepared,  # noqa: F811
):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    done = export(with_data(make_trained(), prepared), str(tmp_path / "exported"))
    assert "pip install protobuf" in done.tokenizer_code
    assert (tmp_path / "exported/tokenization_evomoe.py").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_stays_as_it_is(make_trained, tmp_path, transformers, kind):
    folder = write(tmp_path / "given", kind, chat_template=chat_templates.INST)
    given = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "train.json").unlink()
    trained = with_data(make_trained(), folder)
    tokenizer = trained.codec.tokenizer
    export(trained, str(tmp_path / "exported"))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    start = [] if tokenizer.start is None else [tokenizer.start]
    size = len(tokenizer.tokens)
    added = sorted({token for token in tokenizer.special.values() if token.id >= size})
    if added:  # special tokens in the export too
        words = [transformers.AddedToken(t.word, special=True, normalized=False) for t in added]
        given.add_tokens(words, special_tokens=True)
    assert len(exported) == len(given)
    for text in TEXTS_OF_SCRIPTS:
        assert exported(text)["input_ids"] == given(text)["input_ids"]
        assert exported(text, split_special_tokens=True, add_special_tokens=False)[
            "input_ids"
        ] == trained.codec.encode(text)
    special = tokenizer.special
    assert (exported.eos_token_id, exported.pad_token_id) == (special["eos"].id, special["pad"].id)
    assert exported.bos_token_id == given.bos_token_id
    assert exported.unk_token_id == (
        special["unk"].id if special["unk"].id < len(tokenizer.tokens) else None
    )
    assert trained.start == (start or [special["eos"].id])[0]
    batch = exported(["a b", "a b a b a b"], padding=True)
    assert batch["input_ids"][0][-1] == special["pad"].id
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["eos_token_id"] == special["eos"].id < config["vocab_size"]
    chat = [{"role": "user", "content": "a"}]
    if kind == "llama2":  # has the special tokens of this template
        ids = exported.apply_chat_template(chat, return_dict=False)
        assert ids == given.apply_chat_template(chat, return_dict=False)


def test_a_chats_own_end_ends_generation(make_trained, tmp_path):
    folder = write(tmp_path / "given", "llama3", chat_template=chat_templates.HEADERS)
    trained = with_data(make_trained(), folder)
    library = trained.codec.tokenizer._tokenizer
    export(trained, str(tmp_path / "exported"))
    config = json.loads((tmp_path / "exported/generation_config.json").read_text())
    ends = [library.token_to_id(word) for word in ("<|end_of_text|>", "<|eot_id|>")]
    assert config["eos_token_id"] == sorted(ends)


@pytest.mark.parametrize("kind", FOLDERS)
def test_added_tokens_are_found_in_texts(make_trained, tmp_path, transformers, request, kind):
    folder = request.getfixturevalue(FOLDERS[kind])
    trained = with_data(make_trained(), folder)
    export(trained, str(tmp_path / "exported"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "exported", trust_remote_code=True
    )
    before = len(tokenizer)
    spaced = transformers.AddedToken("<b>", rstrip=True, lstrip=True)
    assert tokenizer.add_tokens(["<a>", "<ab>", spaced]) == 3 and len(tokenizer) == before + 3
    first, longer, eager = range(before, before + 3)
    a, b = trained.codec.encode("a"), trained.codec.encode("b")
    for text, wanted in {
        "a<a>b": [*a, first, *b],
        "<ab><a>": [longer, first],
        "a  <b> b</s>": [*a, eager, *trained.codec.encode("b</s>")],
    }.items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted
    assert tokenizer.decode([*a, first, *b]) == "a<a>b"
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again("a<a>b")["input_ids"] == tokenizer("a<a>b")["input_ids"]


def test_a_pipeline_continues_a_text(make_trained, tmp_path, transformers):
    """It imports what the environment has of torch's family; a torchaudio of CUDA broke it."""
    export(make_trained(), str(tmp_path / "exported"))
    pipeline = transformers.pipeline(
        "text-generation", model=str(tmp_path / "exported"), trust_remote_code=True
    )
    (found,) = pipeline("w1 w2", max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("w1 w2")
    assert len(found["generated_text"]) > len("w1 w2")


def test_what_is_there_is_left_alone(make_trained, tmp_path):
    (tmp_path / "exported").mkdir()
    with pytest.raises(OptionError, match="exported: exists already: give another path"):
        export(make_trained(), str(tmp_path / "exported"))
    assert not list((tmp_path / "exported").iterdir())


def test_whole_or_not_at_all(make_trained, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "write_tokenizer", fail)
    with pytest.raises(RunFailed, match="No space left on device; partial output is removed"):
        export(make_trained(), str(tmp_path / "exported"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_the_folder_holds_what_it_needs_and_no_pickle(make_trained, tmp_path):
    export(make_trained(), str(tmp_path / "exported"))
    names = {entry.name for entry in (tmp_path / "exported").iterdir()}
    assert names == {
        "README.md",
        "attention_evomoe.py",
        "config.json",
        "configuration_evomoe.py",
        "experts_evomoe.py",
        "gate_evomoe.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_evomoe.py",
        "positions_evomoe.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["num_experts"] == [5, 0, 5]
