"""Running again: already prepared, other options, interrupted, killed, out of space."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data import binarize, pipeline, prepare, staging
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.progress import Progress
from tests.data.texts import options_for


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def stray(tmp_path):
    """What lies beside the output, apart from the input."""
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in ("text", "out"))


@pytest.fixture
def shards(monkeypatch):
    """So small that there are many."""
    monkeypatch.setattr(staging, "SHARD_BYTES", 3000)


def test_already_prepared(make, tmp_path, log):
    card = make()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make(workers=2) == card
    assert log.getvalue().splitlines()[-1] == f"already prepared: {tmp_path / 'out'}"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert stray(tmp_path) == []


def change_text(folder):
    (folder / "03.txt").write_text("something else")


def change_as_much(folder):
    text = (folder / "03.txt").read_text()
    (folder / "03.txt").write_text(text[::-1])


CHANGES = {
    "option": (lambda folder: None, {"vocab_size": 320}, "--vocab-size was 400, and is now 320"),
    "fraction": (lambda folder: None, {"valid_fraction": 0.1}, "--valid-fraction was 0.05"),
    "limit": (lambda folder: None, {"max_bytes": 9000}, "--max-bytes was None, and is now 9000"),
    "text": (change_text, {}, "text/03.txt has changed"),
    "same size": (change_as_much, {}, "text/03.txt has changed"),
    "missing": (lambda folder: (folder / "07.txt").unlink(), {}, "text/07.txt is missing"),
    "more": (
        lambda folder: (folder / "zz.txt").write_text("x"),
        {},
        "there were 25 files, now there are 26",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_refuses_other_options_and_overwrites_on_demand(make, folder, tmp_path, case):
    change, given, message = CHANGES[case]
    make()
    before = contents(tmp_path / "out")
    change(folder)
    with pytest.raises(OptionError, match=f"{message}.*--overwrite") as error:
        make(**given)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "out") == before
    card = make(**given, overwrite=True)
    assert contents(tmp_path / "out") != before
    assert make(**given) == card
    assert stray(tmp_path) == []


def test_a_tokenizer_of_another_content(make, tmp_path, trained):
    model = tmp_path / "a.model"
    model.write_bytes((trained / "sentencepiece.model").read_bytes())
    make(sentencepiece_model=str(model))
    model.rename(tmp_path / "b.model")
    make(sentencepiece_model=str(tmp_path / "b.model"))
    with pytest.raises(OptionError, match="--sentencepiece-model was"):
        make()


def test_unread_files_count_too(make, folder):
    make(max_bytes=9000)
    make(max_bytes=9000)
    (folder / "zz.txt").write_text("x")
    with pytest.raises(OptionError, match="now there are 26"):
        make(max_bytes=9000)


def test_a_damaged_set_is_not_taken_for_prepared(make, tmp_path):
    make()
    with open(tmp_path / "out" / "train.bin", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(OptionError, match="train.bin does not match the data card"):
        make()
    make(overwrite=True)
    make()


class Interrupting(Progress):
    """Ctrl-C at the `count`-th advance of a stage."""

    def __init__(self, stream, stage, count):
        super().__init__(stream)
        self.at, self.count = stage, count

    def advance(self, units):
        if self._name == self.at:
            self.count -= 1
            if self.count < 0:
                raise KeyboardInterrupt
        super().advance(units)


@pytest.mark.parametrize(
    ("stage", "count", "kept"),
    [
        ("read", 0, False),
        ("read", 20, False),
        ("binarise", 0, True),
        ("binarise", 2, True),
    ],
)
def test_interrupted_it_goes_on_to_the_same_result(
    folder, tmp_path, shards, log, stage, count, kept
):
    prepare(options_for(tmp_path, folder, out=str(tmp_path / "out")), Progress(log))
    expected = contents(tmp_path / "out")
    out = tmp_path / "again"
    options = options_for(tmp_path, folder, out=str(out))
    with pytest.raises(KeyboardInterrupt):
        prepare(options, Interrupting(log, stage, count))
    assert not out.exists()
    assert stray(tmp_path) == ([".again.preparing"] if kept else [])
    assert not multiprocessing.active_children()
    prepare(options, Progress(log))
    assert ("continuing an interrupted run" in log.getvalue()) == kept
    assert contents(out) == expected
    assert stray(tmp_path) == ["again"]


def test_interrupted_work_is_not_used_for_other_options(folder, tmp_path, shards, log):
    with pytest.raises(KeyboardInterrupt):
        prepare(options_for(tmp_path, folder), Interrupting(log, "binarise", 1))
    prepare(options_for(tmp_path, folder, seed=2), Progress(log))
    assert "continuing" not in log.getvalue()
    first = contents(tmp_path / "out")
    prepare(options_for(tmp_path, folder, seed=2, out=str(tmp_path / "b")), Progress(log))
    assert first == contents(tmp_path / "b")


def test_an_older_set_stays_until_the_new_one_is_complete(make, folder, tmp_path, log):
    make()
    before = contents(tmp_path / "out")
    options = options_for(tmp_path, folder, overwrite=True, seed=2)
    for stage in ("read", "binarise"):
        with pytest.raises(KeyboardInterrupt):
            prepare(options, Interrupting(log, stage, 0))
        assert contents(tmp_path / "out") == before
    prepare(options, Progress(log))
    assert contents(tmp_path / "out") != before
    assert stray(tmp_path) == []


@pytest.mark.distributed
def test_killed_it_leaves_no_worker_and_goes_on(folder, tmp_path, shards, log, monkeypatch):
    """SIGKILL, while workers are at work."""
    prepare(options_for(tmp_path, folder), Progress(log))
    options = options_for(tmp_path, folder, out=str(tmp_path / "again"), workers=2)
    monkeypatch.setattr(binarize, "rename", lambda *_: time.sleep(60))
    context = multiprocessing.get_context("fork")
    run = context.Process(target=prepare, args=(options, Progress(log)))
    run.start()
    work = tmp_path / ".again.preparing"
    wait_for(lambda: list(work.glob("*.part.idx")))
    run.kill()
    run.join()
    wait_for(lambda: lockable(work / "lock"))  # every worker holds it
    monkeypatch.undo()
    monkeypatch.setattr(staging, "SHARD_BYTES", 3000)
    assert not (tmp_path / "again").exists()
    prepare(options, Progress(log))
    assert "continuing" in log.getvalue()
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert stray(tmp_path) == ["again"]


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def lockable(path):
    with open(path) as stream, contextlib.suppress(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        (staging._ShardWriter, "write"),
        (pipeline, "train_sentencepiece"),
        (binarize, "rename"),
        (binarize, "merge"),
        (OutputFolder, "publish"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_rubbish(make, tmp_path, monkeypatch, where):
    make()
    before = contents(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(*where, no_space)
        with pytest.raises(RunFailed, match="no space left on the disk") as error:
            make(seed=2, overwrite=True)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "out") == before
    assert stray(tmp_path) == []


def end_suddenly(*_):
    os._exit(9)


def test_a_dead_worker_is_one_line(make, tmp_path, monkeypatch, log):
    with monkeypatch.context() as patch:
        patch.setattr(binarize, "rename", end_suddenly)
        with pytest.raises(RunFailed, match="a worker process was killed"):
            make()
    assert not (tmp_path / "out").exists()
    make()
    assert "continuing" in log.getvalue()


def test_one_at_a_time(make, tmp_path, monkeypatch):
    monkeypatch.setattr("evomoe_plugin.data.folder.LOCK_SECONDS", 0.1)
    (tmp_path / ".out.preparing").mkdir()
    with open(tmp_path / ".out.preparing" / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(RunFailed, match="another evomoe prepare is writing"):
            make()
    make()
    assert stray(tmp_path) == []


@pytest.mark.parametrize("complete", [False, True])
def test_killed_while_it_was_replacing(make, tmp_path, complete):
    """The older set had made way; the new one had, or had not, got its name."""
    card = make()
    os.rename(tmp_path / "out", tmp_path / ".out.replaced")
    if complete:
        make(out=str(tmp_path / "new"))
        os.rename(tmp_path / "new", tmp_path / "out")
    assert make() == card
    assert stray(tmp_path) == []


def test_an_unreadable_file_is_one_line(make, folder, monkeypatch):
    def deny(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "03.txt"))

    monkeypatch.setattr(staging, "read_documents", deny)
    with pytest.raises(RunFailed, match=r"03.txt: Permission denied"):
        make()
