"""Text files of all formats, drawn by hypothesis: `evomoe prepare` and fine-tuning read what was
written, or refuse it by file and line.

A case is a number of examples of one format; hypothesis shrinks what fails to its smallest form.
"""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from evomoe_plugin.config.errors import OptionError
from tests.torture import disks, forked
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, DRAW = "text", "Text", 1
DRAWN = 400
"""Cases of drawn files; those after them are `EXTREMES`."""
EXAMPLES = 20
"""Of each case."""

_MEMORY, _MEMORY_OF_EXTREMES, _LIMIT_SECONDS = 2 * 2**30, 6 * 2**30, 1200

_odd = st.sampled_from(
    [
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        "\x00",
        "\ufeff",
        "\u2028",
        "\x0c",
        "\x85",
        " ",
        "\t",
        "</s>",
        "\u2581",
    ]
)
_texts = st.lists(st.one_of(st.text(max_size=20), _odd), max_size=8).map("".join)
_noise = st.one_of(
    st.binary(max_size=60),
    _texts.map(lambda t: t.encode("utf-8")),
    _texts.map(lambda t: t.encode("utf-8-sig")),
    _texts.map(lambda t: t.encode("utf-16")),
    _texts.map(lambda t: t.encode("latin-1", "replace")),
)
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)
_row = st.one_of(
    st.fixed_dictionaries({"text": _texts}),
    st.fixed_dictionaries({"text": _json}, optional={"other": _json}),
    _json,
)
_role = st.sampled_from(["user", "assistant", "system", "tool", "", 3])
_message = st.one_of(
    st.fixed_dictionaries({"role": _role, "content": st.one_of(_texts, _json)}), _json
)
_chat = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(_message, max_size=4)}),
    st.fixed_dictionaries({"prompt": _texts, "response": _texts}),
    st.fixed_dictionaries({"instruction": _texts, "output": _texts}, optional={"input": _texts}),
    _row,
)


def _lines_of(rows: list[Any], ending: str = "\n") -> bytes:
    return ending.join(json.dumps(row) for row in rows).encode() + ending.encode()


class Prepared:
    """Runs `prepare` in a folder, with a tokenizer of bytes."""

    def __init__(self, folder: Path, tokenizer: Path):
        self.folder, self.tokenizer = folder, tokenizer

    def documents(self, name: str, content: bytes, **options: Any) -> list[str] | None:
        """The texts that were prepared from a file; None: it was refused, by its name."""
        from evomoe_plugin.data import PrepareOptions, prepare
        from evomoe_plugin.data.progress import Progress
        from tests.data.texts import PreparedText

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        path, out = self.folder / name, self.folder / "out"
        path.write_bytes(content)
        held = [self.folder / f"{split}.txt" for split in ("valid", "test")]
        for file in held:
            file.write_text(f"held out for {file.stem}")
        try:
            prepare(
                PrepareOptions(
                    inputs=(str(path),),
                    out=str(out),
                    valid=(str(held[0]),),
                    test=(str(held[1]),),
                    sentencepiece_model=str(self.tokenizer),
                    workers=1,
                    **options,
                ),
                Progress(io.StringIO()),
            )
        except OptionError as error:
            message = str(error)
            assert "\n" not in message, f"more than one line: {message!r}"
            assert name in message, f"does not name the file: {message}"
            assert not out.exists(), "something was written"
            return None
        return PreparedText(out).documents("train")


def _blank(text: str) -> bool:
    return not text.strip()


def _same(found: list[str] | None, wanted: list[str] | None) -> None:
    """Equal up to documents without text; None: refused."""
    if found is None and (wanted is None or all(map(_blank, wanted))):
        return
    assert wanted is not None, f"accepted, but it is not valid: {found!r}"
    assert found is not None, f"refused, but it is valid: {wanted!r}"
    one, other = (Counter(t for t in texts if not _blank(t)) for texts in (found, wanted))
    if one != other:
        raise AssertionError(f"read {_shown(one)}, written {_shown(other)}")


def _shown(texts: Counter) -> str:
    return repr([text[:100] for text in sorted(texts)])


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _file(run: Prepared, content: bytes) -> None:
    text = _decoded(content)
    _same(run.documents("a.txt", content), None if text is None else [text])


def _by_line(run: Prepared, content: bytes) -> None:
    text = _decoded(content)
    wanted = None if text is None else re.split("\r\n|\r|\n", text)
    _same(run.documents("a.txt", content, documents_by="line"), wanted)


def _rows_of(lines: list[bytes]) -> list[str] | None:
    """The texts of JSON lines, as they are written; None where one is no such row."""
    texts = []
    for number, line in enumerate(lines):
        text = _decoded(line) if number == 0 else _plain(line)
        if text is None:
            return None
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            value = row["text"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            return None
        if value is not None and not isinstance(value, str):
            return None
        texts.append(value or "")
    return None if any(_surrogate(text) for text in texts) else texts


def _plain(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _json_lines(run: Prepared, lines: list[bytes]) -> None:
    content = b"\n".join(lines)
    _same(run.documents("a.jsonl", content), _rows_of(content.split(b"\n")))


def _json_array(run: Prepared, rows: list[Any]) -> None:
    content = json.dumps(rows).encode()
    wanted = _rows_of([json.dumps(row).encode() for row in rows])
    _same(run.documents("a.json", content), wanted)


def _parquet(run: Prepared, drawn: tuple[list[str | None], str, str, list[str]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    texts, kind, compression, names = drawn
    types = {
        "string": pa.string(),
        "large_string": pa.large_string(),
        "binary": pa.binary(),
        "large_binary": pa.large_binary(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "string_view": pa.string_view(),
        "int64": pa.int64(),
        "list": pa.list_(pa.string()),
    }
    own: list[Any] = list(texts)
    if "binary" in kind:
        own = [None if t is None else t.encode() for t in texts]
    elif kind == "int64":
        own = [None if t is None else len(t) for t in texts]
    elif kind == "list":
        own = [None if t is None else [t] for t in texts]
    columns = [
        pa.array(own, types[kind]) if name == "text" else pa.array(range(len(texts)))
        for name in names
    ]
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(columns, names=names), stream, compression=compression)
    valid = kind not in ("int64", "list") and names.count("text") == 1
    wanted = [t or "" for t in texts] if valid else None
    _same(run.documents("a.parquet", stream.getvalue()), wanted)


def _fine_tuning(run: Prepared, lines: list[bytes]) -> None:
    """Fine-tuning and `prepare --rows chat` take the same files, and name the same line."""
    from evomoe_plugin.data.sft_files import bad_record, read_records
    from evomoe_plugin.data.turns import BadRecord, Templates, read_turns

    content = b"\n".join(lines)
    found = run.documents("a.jsonl", content, rows="chat")
    texts: list[str] | None = []
    try:
        for place, record in read_records(run.folder / "a.jsonl"):
            try:
                texts.append("".join(t.text for t in read_turns(record, Templates()).turns))
            except BadRecord as error:
                raise bad_record(place, error) from None
    except OptionError as error:
        assert "\n" not in str(error) and "a.jsonl" in str(error), str(error)
        texts = None
    if texts is None and found is not None:
        # A blank line is skipped where texts are read, and refused where each line is a sample.
        assert any(not line.strip() for line in content.split(b"\n")), f"only prepared: {found!r}"
    elif texts is not None and not any(map(_surrogate, texts)):
        _same(found, texts)


_line = st.one_of(_row.map(lambda r: json.dumps(r).encode()), _noise)
_chat_line = st.one_of(_chat.map(lambda r: json.dumps(r).encode()), _noise)
_columns = st.lists(st.sampled_from(["text", "id", "text", "a", "b"]), min_size=1, max_size=4)
_kinds = st.sampled_from(
    "string large_string binary large_binary dictionary string_view int64 list".split()
)
_compressions = st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
FORMATS: dict[str, tuple[Callable[[Prepared, Any], None], Any]] = {
    "a file": (_file, _noise),
    "lines": (_by_line, _noise),
    "JSON lines": (_json_lines, st.lists(_line, max_size=4)),
    "a JSON array": (_json_array, st.lists(_row, max_size=4)),
    "Parquet": (
        _parquet,
        st.tuples(st.lists(st.none() | _texts, max_size=4), _kinds, _compressions, _columns),
    ),
    "fine-tuning": (_fine_tuning, st.lists(_chat_line, min_size=1, max_size=3)),
}


def _long_line() -> bytes:
    """100 MB without a line break."""
    return b"a b c " * (100_000_000 // 6)


def _long_row() -> bytes:
    return json.dumps({"text": _long_line().decode()}).encode()


def _long_chat() -> bytes:
    return json.dumps({"prompt": "a", "response": _long_line().decode()}).encode()


_DEEP_LIST = b"[" * 200_000 + b"]" * 200_000
_DEEP_ROW = b'{"text": "a", "b": ' + b'{"b": ' * 100_000 + b"1" + b"}" * 100_001
_DEEP_CHAT = _DEEP_ROW.replace(b'"text": "a"', b'"prompt": "a", "response": "c"', 1)
EXTREMES: dict[str, tuple[str, Callable[[], Any]]] = {
    "a line of 100 MB": ("lines", _long_line),
    "a row of 100 MB": ("JSON lines", lambda: [_long_row()]),
    "an answer of 100 MB": ("fine-tuning", lambda: [_long_chat()]),
    "a deep list": ("JSON lines", lambda: [_DEEP_LIST]),
    "a row with a deep field": ("JSON lines", lambda: [_DEEP_ROW]),
    "a sample with a deep field": ("fine-tuning", lambda: [_DEEP_CHAT]),
}
CASES = DRAWN + len(EXTREMES)


def smoke() -> Iterable[int]:
    """JSON lines."""
    return (2,)


def prepare(work: Path) -> None:
    tokenizer(work)


def tokenizer(work: Path) -> Path:
    """A model of SentencePiece for any text, trained where it is missing."""
    path = work / "bytes" / "sentencepiece.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)

        def train() -> None:
            from evomoe_plugin.data import prepare as prepare_text
            from evomoe_plugin.data.progress import Progress
            from tests.data.texts import options_for, words

            file = path.parent / "text.txt"
            file.write_text("\n\n".join(words(n) for n in range(20)))
            options = options_for(path.parent, file, documents_by="blank-line")
            prepare_text(options, Progress(io.StringIO()))
            shutil.copyfile(path.parent / "out" / path.name, path)

        ended = forked.call(train, timeout=300)
        assert path.exists(), ended.output[-2000:]
    return path


def case(seed: int, work: Path) -> Outcome:
    run = Prepared(folder_of(NAME, seed, work) / "text", tokenizer(work))
    if seed < DRAWN:
        name = list(FORMATS)[seed % len(FORMATS)]
        examples, memory = _examples(run, *FORMATS[name], seed), _MEMORY
    else:
        name = list(EXTREMES)[seed - DRAWN]
        form, content = EXTREMES[name]
        examples = functools.partial(_extreme, run, FORMATS[form][0], content)
        memory = _MEMORY_OF_EXTREMES

    def faults() -> str:
        try:
            examples()
        except Exception as error:
            shown = next((n for n in getattr(error, "__notes__", ()) if "Falsifying" in n), "")
            return f"{type(error).__name__}: {str(error)[:300]}; {' '.join(shown.split())}"[:390]
        return ""

    ended = forked.call(faults, _LIMIT_SECONDS, memory)
    fault = ended.value if ended.status == 0 else disks.verdict(ended) or ended.tail
    return Outcome(name, fault or "")


def _examples(
    run: Prepared, check: Callable[[Prepared, Any], None], strategy: Any, seed: int
) -> Callable[[], None]:
    @seeded(seed)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def examples(drawn: Any) -> None:
        check(run, drawn)

    return examples


def _extreme(
    run: Prepared, check: Callable[[Prepared, Any], None], content: Callable[[], Any]
) -> None:
    check(run, content())
