"""Files made to harm whoever reads them: none executes, none fills memory or disk.

Each is given to the command that reads such files, with a gibibyte of memory and ten minutes to
spare; it ends in one line that names the file and says why, leaves no trace of a program, and no
large file; or the file is read, where it does no harm.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.torture import disks, forked, text, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, DRAW = "hostile", "Hostile files", 2

_MEMORY, _LIMIT_SECONDS, _MOST_DISK = 2**30, 600, 2**26

# Makes a file in a folder, for a program that would leave `trace`; returns the command to run.
Make = Callable[[Path, Path, Path], Callable[[], Any]]


class _Reduced:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _programs(trace: str) -> dict[str, Any]:
    """Objects that write `trace` when they are unpickled, by the trick that they use."""
    import builtins
    import codecs
    import operator
    import runpy
    import shutil
    import subprocess
    import types
    import webbrowser

    write = f"open({trace!r}, 'w')"
    return {
        "os.system": _Reduced(os.system, f"touch {trace}"),
        "eval": _Reduced(builtins.eval, write),
        "exec": _Reduced(builtins.exec, write),
        "open": _Reduced(builtins.open, trace, "w"),
        "subprocess.Popen": _Reduced(subprocess.Popen, ["touch", trace]),
        "subprocess.run": _Reduced(subprocess.run, ["touch", trace]),
        "os.popen": _Reduced(os.popen, f"touch {trace}"),
        "os.mkdir": _Reduced(os.mkdir, trace),
        "shutil.copyfile": _Reduced(shutil.copyfile, "/etc/hostname", trace),
        "codecs.open": _Reduced(codecs.open, trace, "w"),
        "io.FileIO": _Reduced(io.FileIO, trace, "w"),
        "runpy.run_path": _Reduced(runpy.run_path, trace),
        "webbrowser.open": _Reduced(webbrowser.open, f"file://{trace}"),
        "operator.methodcaller": _Reduced(operator.methodcaller, "touch"),
        "getattr": _Reduced(builtins.getattr, "a", "upper"),
        "__import__": _Reduced(builtins.__import__, "antigravity"),
        "compile": _Reduced(builtins.compile, write, "x", "exec"),
        "torch.load": _Reduced(torch.load, "/etc/hostname"),
        "torch.save": _Reduced(torch.save, {}, trace),
        "torch.hub.load": _Reduced(torch.hub.load, "x/y", "z"),
        "torch.jit.load": _Reduced(torch.jit.load, "/etc/hostname"),
        "pickle.loads": _Reduced(pickle.loads, pickle.dumps(_Reduced(os.system, f"touch {trace}"))),
        "functools.partial": functools.partial(os.system, f"touch {trace}"),
        "types.SimpleNamespace": types.SimpleNamespace(a=1),
        "a module's class": zipfile.Path.__new__(zipfile.Path),
    }


def _state(work: Path) -> dict:
    path = tiny.unbroken(work, "one process") / "checkpoint_last.pt"
    return torch.load(path, weights_only=False)


def _evaluation(work: Path, path: Path) -> Callable[[], Any]:
    arguments = tiny.evaluation_arguments(tiny.data(work), path)
    return lambda: forked.command("eval_lm", arguments)


def _evomoe(*arguments: object) -> Callable[[], Any]:
    from evomoe_plugin.cli import main

    return lambda: sys.exit(main([str(a) for a in arguments]))


def _pickle(place: str, name: str) -> Make:
    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        state = _state(work)
        program = _programs(str(trace))[name]
        if place == "top":
            state = program
        else:
            state[place] = {**state[place], "x": program} if state[place] else {"x": program}
        path = folder / "checkpoint.pt"
        _save(state, path)
        if place == "cfg":
            return _evomoe("checkpoint", "inspect", path)
        return _evaluation(work, path)

    return make


def _save(state: Any, path: Path) -> None:
    class Pickle:
        """pickle, for objects that it refuses to look up in this module."""

        Pickler = pickle._Pickler
        dump = staticmethod(pickle.dump)

    torch.save(state, path, pickle_module=Pickle)


def _raw_pickle(content: bytes) -> Make:
    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        path = folder / "checkpoint.pt"
        path.write_bytes(content.replace(b"TRACE", str(trace).encode()))
        return _evaluation(work, path)

    return make


def _records(change: Callable[[dict[str, bytes]], None]) -> Make:
    """A checkpoint whose records were changed and packed again, large ones compressed."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        source = tiny.unbroken(work, "one process") / "checkpoint_last.pt"
        with zipfile.ZipFile(source) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records)
        path = folder / "checkpoint.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                large = len(content) > 2**25
                archive.writestr(name, content, zipfile.ZIP_DEFLATED if large else None)
        return _evaluation(work, path)

    return make


def _bomb(records: dict[str, bytes]) -> None:
    name = next(n for n in records if n.endswith("data/0"))
    records[name] = bytes(2**30)


def _bomb_beside(records: dict[str, bytes]) -> None:
    folder = next(iter(records)).partition("/")[0]
    records[f"{folder}/data/99999"] = bytes(2**30)


def _traversal(records: dict[str, bytes]) -> None:
    records["../../../../tmp/evomoe-traversal"] = b"x"
    records["/tmp/evomoe-absolute"] = b"x"


def _many(records: dict[str, bytes]) -> None:
    folder = next(iter(records)).partition("/")[0]
    records.update({f"{folder}/data/{n}": b"" for n in range(1000, 40000)})


def _deep_pickle(records: dict[str, bytes]) -> None:
    name = next(n for n in records if n.endswith("data.pkl"))
    records[name] = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."


def _huge_storage(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
    """A tensor that says it has 2^60 elements."""
    state = _state(work)
    name = next(iter(state["model"]))
    state["model"][name] = torch.zeros(1).expand(2**40)
    torch.save(state, folder / "checkpoint.pt")
    return _evaluation(work, folder / "checkpoint.pt")


def _interpolation(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
    """A configuration that reads the environment when it is looked at."""
    os.environ["EVOMOE_SECRET"] = "a-secret"
    state = _state(work)
    state["cfg"]["task"]["data"] = "${oc.env:EVOMOE_SECRET}"
    state["cfg"]["model"]["moe_gate"] = "${oc.env:EVOMOE_SECRET}"
    torch.save(state, folder / "checkpoint.pt")
    return _evaluation(work, folder / "checkpoint.pt")


def _of_manifest(change: Callable[[dict], None]) -> Make:
    """A checkpoint of sharded experts whose list of files was changed."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        import shutil

        from evomoe_plugin.checkpoint.expert_shards import KEY

        source = tiny.unbroken(work, "sharded experts")
        shutil.copytree(source / "checkpoint_last.experts", folder / "checkpoint.experts")
        state = torch.load(source / "checkpoint_last.pt", weights_only=False)
        change(state[KEY])
        torch.save(state, folder / "checkpoint.pt")
        return _evaluation(work, folder / "checkpoint.pt")

    return make


def _tag(value: Any) -> Make:
    return _of_manifest(lambda manifest: manifest.update(tag=value))


def _file_name(value: str) -> Make:
    def change(manifest: dict) -> None:
        first = manifest["files"][0]
        if isinstance(first, dict):
            first["name"] = value
        else:
            manifest["files"][0] = (value, *first[1:])

    return _of_manifest(change)


def _link_out(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
    """A checkpoint that is a link to a device without end."""
    (folder / "checkpoint.pt").symlink_to("/dev/zero")
    return _evaluation(work, folder / "checkpoint.pt")


def _pipe(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
    """A checkpoint that is a pipe nobody writes to."""
    os.mkfifo(folder / "checkpoint.pt")
    return _evaluation(work, folder / "checkpoint.pt")


def _safetensors(content: bytes) -> Make:
    """A folder of Hugging Face with such weights."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**config, **sizes, "intermediate_size": 8}))
        (model / "model.safetensors").write_bytes(content)
        return _evomoe("import-hf", model, folder / "out.pt")

    return make


def _header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def _tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _index(target: str) -> Make:
    """An index of weights that names a file elsewhere."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        command = _safetensors(b"")(work, folder, trace)
        (folder / "model" / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        return command

    return make


def _remote_code(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
    """A model that brings a program of its own, and is valid without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "model" / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    return _evomoe("import-hf", folder / "model", folder / "out.pt")


def _prepared(**options: Any) -> Make:
    """`evomoe prepare` with a tokenizer made of such bytes."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        lines = "".join(f"b a{'a' * n}!\n" for n in range(500))
        line = _prepare(folder, "text.txt", lines.encode())
        for name, content in options.items():
            path = folder / name
            if name == "tokenizer":
                path.mkdir()
                (path / "tokenizer.json").write_text(content)
                (path / "tokenizer_config.json").write_text("{}")
            else:
                path.write_bytes(content)
            line += [f"--{name.replace('_', '-')}", path]
        return _evomoe(*line)

    return make


def _tokenizer(**changed: Any) -> str:
    plain = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }
    return json.dumps({**plain, **changed})


_FLAGS = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)


def _rows(name: str, content: Callable[[], bytes]) -> Make:
    """`evomoe prepare` of such a file."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        line = _prepare(folder, name, content())
        line += ["--sentencepiece-model", text.tokenizer(work), "--max-bytes", "5M"]
        return _evomoe(*line)

    return make


def _prepare(folder: Path, name: str, content: bytes) -> list[object]:
    """A command whose texts are enough for all splits, so that nothing but the file is wrong."""
    (folder / name).write_bytes(content)
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text(f"a text of {split}")
    line: list[object] = ["prepare", folder / name, "--out", folder / "out", "--workers", "1"]
    line += ["--documents-by", "line", "--valid", folder / "valid.txt"]
    return [*line, "--test", folder / "test.txt"]


def _parquet_bomb() -> bytes:
    """Half a gibibyte of one letter in a few kilobytes."""
    import pyarrow as pa
    from pyarrow import parquet

    stream = io.BytesIO()
    text = "a" * 2**20
    table = pa.table({"text": pa.array([text] * 512).dictionary_encode()})
    parquet.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def _template(source: str) -> Make:
    """A chat template, rendered for one chat."""

    def make(work: Path, folder: Path, trace: Path) -> Callable[[], Any]:
        from evomoe_plugin.config.errors import one_line_errors
        from evomoe_plugin.data.chat_template import ChatTemplate

        template = ChatTemplate(source.replace("TRACE", str(trace)), "template", {}, ())

        def render() -> None:
            from evomoe_plugin.data.chat_template import BadTemplate, Message

            with one_line_errors():
                try:
                    template.spans([Message("user", "a"), Message("assistant", "b")])
                except BadTemplate as error:
                    print(f"error: {error}")
                    sys.exit(2)

        return render

    return make


_ESCAPE = "''.__class__.__mro__[1].__subclasses__()"
TEMPLATES = {
    "classes": "{{ " + _ESCAPE + " }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "attr": "{{ ''|attr('__class__') }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "endless": "{% for a in range(99999999) %}{% for b in range(99999999) %}{% endfor %}"
    "{% endfor %}",
    "memory": "{{ 'a' * 99999999999 }}",
    "doubled": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "changes": "{{ messages.append(1) }}{{ messages.clear() }}",
}

FILES: dict[str, Make] = {
    **{f"pickle: {name}": _pickle("extra_state", name) for name in _programs("x")},
    **{
        f"pickle in {place}: os.system": _pickle(place, "os.system")
        for place in ("top", "cfg", "model", "last_optimizer_state")
    },
    "a pickle alone": _raw_pickle(b"cposix\nsystem\n(S'touch TRACE'\ntR."),
    "a pickle alone, protocol 0": _raw_pickle(b"c__builtin__\neval\n(S\"open('TRACE','w')\"\ntR."),
    "zip bomb": _records(_bomb),
    "zip bomb, in a part that is not used": _records(_bomb_beside),
    "zip with paths outside": _records(_traversal),
    "zip of 39,000 records": _records(_many),
    "pickle of 200,000 levels": _records(_deep_pickle),
    "a tensor of 2^40 elements": _huge_storage,
    "a configuration that reads the environment": _interpolation,
    "a link to /dev/zero": _link_out,
    "a pipe": _pipe,
    "tag: ../..": _tag("../../../../../../etc"),
    "tag: /etc": _tag("/etc"),
    "tag: a number": _tag(3),
    "shard: ../../x": _file_name("../../../x.safetensors"),
    "shard: /etc/passwd": _file_name("/etc/passwd"),
    "shard: a null": _file_name("a\0b"),
    "safetensors: header of 2^62": _safetensors(struct.pack("<Q", 2**62) + b"{}"),
    "safetensors: header of 90 MB": _safetensors(
        struct.pack("<Q", 90 * 10**6) + b'{"a":' + b" " * (90 * 10**6 - 6) + b"}"
    ),
    "safetensors: 2^50 elements": _safetensors(_header(a=_tensor([2**25, 2**25], [0, 2**52]))),
    "safetensors: offsets overlap": _safetensors(
        _header(a=_tensor([8], [0, 32]), b=_tensor([8], [16, 48]))
    ),
    "safetensors: offsets turned": _safetensors(_header(a=_tensor([8], [32, 0]))),
    "safetensors: shape negative": _safetensors(_header(a=_tensor([-8], [0, 32]))),
    "safetensors: unknown dtype": _safetensors(_header(a=_tensor([8], [0, 32], "X32"))),
    "index: ../../x": _index("../../x.safetensors"),
    "index: /etc/passwd": _index("/etc/passwd"),
    "a model with a program": _remote_code,
    "sentencepiece: noise": _prepared(sentencepiece_model=b"\x0a\xff\xff\xff\xff\x0f" * 999),
    "sentencepiece: empty": _prepared(sentencepiece_model=b""),
    "sentencepiece: a length of 2^31": _prepared(sentencepiece_model=b"\x0a\xff\xff\xff\xff\x07ab"),
    "tokenizer: no JSON": _prepared(tokenizer="{" * 100_000),
    "tokenizer: id of 2^31": _prepared(
        tokenizer=_tokenizer(model={"type": "BPE", "vocab": {"a": 2**31}, "merges": []})
    ),
    "tokenizer: 300,000 added tokens": _prepared(
        tokenizer=_tokenizer(
            added_tokens=[
                {"id": n, "content": f"t{n}", "special": True, **_FLAGS} for n in range(2, 300_002)
            ]
        )
    ),
    "tokenizer: a slow pattern": _prepared(
        tokenizer=_tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a+)+(e+)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    ),
    "parquet bomb": _rows("a.parquet", _parquet_bomb),
    "parquet: noise": _rows("a.parquet", lambda: b"PAR1" + bytes(range(256)) * 9 + b"PAR1"),
    "json of 100,000 levels": _rows("a.jsonl", lambda: b'{"text":' + b"[" * 100_000 + b"\n"),
    "json: a number of 10^6 digits": _rows("a.jsonl", lambda: b'{"text":' + b"9" * 10**6 + b"}\n"),
    **{f"template: {name}": _template(source) for name, source in TEMPLATES.items()},
}
CASES = len(FILES)

# What the line says, by the first words of a file's name; `_READ`: there is none, it is read.
_READ = ""
REASONS = {
    "pickle of": "no checkpoint of fairseq",
    "pickle": "could run a program",
    "a pickle": "could run a program",
    "zip bomb": "compressed",
    "zip with": "not in a subdirectory",
    "zip of": _READ,
    "a tensor": "does not hold each",
    "a configuration": "computed by a resolver",
    "a link": "is no file",
    "a pipe": "is no file",
    "tag: a number": "is missing",
    "tag": "its list of experts is invalid",
    "shard: a null": "is missing",
    "shard": "its list of experts is invalid",
    "safetensors": "no file of safetensors",
    "index": "names files of other folders",
    "a model": _READ,
    "sentencepiece": "not a SentencePiece model",
    "tokenizer: no JSON": "no tokenizer.json",
    "tokenizer: id": "ids below",
    "tokenizer: 300,000": _READ,
    "tokenizer: a slow": "cannot encode a text",
    "parquet bomb": _READ,
    "parquet": "cannot be read as Parquet",
    "json": "is not JSON",
    "template: attr": "does not write the content",
    "template": "fails: ",
}


def _misjudged(name: str, ended: forked.Ended, files: Path) -> str:
    """How a line differs from what is right for a file; empty: nowhere."""
    wanted = next(reason for begin, reason in REASONS.items() if name.startswith(begin))
    if (wanted == _READ) != (ended.status == 0):
        return f"it ended with {ended.status}: {ended.tail}"
    if wanted == _READ:
        return ""
    named = name.startswith("template") or str(files) in ended.error
    return "" if named and wanted in ended.error else f"the line is not about it: {ended.error}"


def smoke() -> Iterable[int]:
    names = list(FILES)
    return tuple(names.index(n) for n in ("pickle: os.system", "tag: ../..", "template: globals"))


def prepare(work: Path) -> None:
    for layout in ("one process", "sharded experts"):
        tiny.unbroken(work, layout)


def case(seed: int, work: Path) -> Outcome:
    name = list(FILES)[seed]
    folder = folder_of(NAME, seed, work)
    trace, files = folder / "trace", folder / "files"
    files.mkdir()
    command = FILES[name](work, files, trace)
    before = tiny.size(files)
    ended = forked.call(command, _LIMIT_SECONDS, _MEMORY)
    fault = disks.verdict(ended) or _misjudged(name, ended, files)
    if trace.exists():
        fault = "its program was run"
    elif "a-secret" in ended.output:
        fault = "it shows the environment"
    elif tiny.size(folder) - before > _MOST_DISK:
        fault = f"it left {tiny.size(folder) - before} bytes"
    return Outcome(f"{name}: {'read' if ended.status == 0 else 'refused'}", fault)
