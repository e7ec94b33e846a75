"""Checkpoints whose bytes or content were damaged, given to evaluation and to a run that resumes.

Each command refuses the file in one line that names it, or ends exactly as with the good one.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.torture import disks, forked, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "damage", "Damaged checkpoints", 1000, 1

FORMS = ("one process", "sharded experts", "file a rank", "fp16")
MORE_UPDATES = 2

Dice = random.Random
Files = list[Path]


# --- of bytes: (dice, the checkpoint's files, those of an earlier update)


def _flip_a_bit(dice: Dice, files: Files, _: Files) -> None:
    _change(dice.choice(files), lambda b: _flipped(dice, b))


def _flip_some(dice: Dice, files: Files, _: Files) -> None:
    for _i in range(dice.randrange(2, 40)):
        _flip_a_bit(dice, files, _)


def _cut_short(dice: Dice, files: Files, _: Files) -> None:
    _change(dice.choice(files), lambda b: b[: dice.randrange(len(b))])


def _cut_a_tail(dice: Dice, files: Files, _: Files) -> None:
    _change(dice.choice(files), lambda b: b[: -dice.randrange(1, 200)])


def _zero_a_page(dice: Dice, files: Files, _: Files) -> None:
    def change(content: bytes) -> bytes:
        at = dice.randrange(0, len(content), 512)
        return content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]

    _change(dice.choice(files), change)


def _swap_blocks(dice: Dice, files: Files, _: Files) -> None:
    def change(content: bytes) -> bytes:
        a, b = sorted(dice.sample(range(0, len(content) - 512, 512), 2))
        one, other = content[a : a + 512], content[b : b + 512]
        return content[:a] + other + content[a + 512 : b] + one + content[b + 512 :]

    _change(dice.choice(files), change)


def _append(dice: Dice, files: Files, _: Files) -> None:
    _change(dice.choice(files), lambda b: b + dice.randbytes(dice.randrange(1, 300)))


def _empty(dice: Dice, files: Files, _: Files) -> None:
    _change(dice.choice(files), lambda _content: b"")


def _remove(dice: Dice, files: Files, _: Files) -> None:
    """Where there is one file, it is emptied: without it, a run begins, as is right."""
    if len(files) < 2:
        return _empty(dice, files, _)
    return dice.choice(files[1:]).unlink()


def _folder_instead(dice: Dice, files: Files, _: Files) -> None:
    path = dice.choice(files)
    path.unlink()
    path.mkdir()


def _swap_files(dice: Dice, files: Files, earlier: Files) -> None:
    if len(files) < 2:
        return _of_an_earlier_update(dice, files, earlier)
    one, other = dice.sample(files, 2)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    return None


def _of_an_earlier_update(dice: Dice, files: Files, earlier: Files) -> None:
    """Of one of several files; where there is one, it is a good checkpoint: cut short."""
    if len(files) < 2:
        return _cut_short(dice, files, earlier)
    index = dice.randrange(1, len(files))
    shutil.copyfile(earlier[index], files[index])
    return None


BYTES = (
    _flip_a_bit,
    _flip_some,
    _cut_short,
    _cut_a_tail,
    _zero_a_page,
    _swap_blocks,
    _append,
    _empty,
    _remove,
    _folder_instead,
    _swap_files,
    _of_an_earlier_update,
)


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _flipped(dice: Dice, content: bytes) -> bytes:
    at = dice.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]


# --- of content, in a file that is written anew with right checksums: (dice, state)


def _weight(dice: Dice, state: dict) -> str:
    return dice.choice([n for n, v in state["model"].items() if v.is_floating_point() and v.dim()])


def _not_finite(dice: Dice, state: dict) -> None:
    weight = state["model"][_weight(dice, state)]
    weight.view(-1)[dice.randrange(weight.numel())] = dice.choice([float("nan"), float("inf")])


def _other_shape(dice: Dice, state: dict) -> None:
    name = _weight(dice, state)
    state["model"][name] = torch.cat([state["model"][name]] * 2)


def _transposed(dice: Dice, state: dict) -> None:
    name = _weight(dice, state)
    weight = state["model"][name]
    state["model"][name] = weight.reshape(weight.shape[::-1])[:-1].clone()


def _no_tensor(dice: Dice, state: dict) -> None:
    name = _weight(dice, state)
    state["model"][name] = ["a", "list"] if dice.random() < 0.5 else None


def _weight_missing(dice: Dice, state: dict) -> None:
    del state["model"][_weight(dice, state)]


def _weight_too_many(dice: Dice, state: dict) -> None:
    state["model"]["decoder.layers.7.fc1.weight"] = torch.zeros(3)


def _moments(dice: Dice, state: dict) -> dict[str, Any]:
    return dice.choice([v for v in state["last_optimizer_state"]["state"].values() if v])


def _moment_not_finite(dice: Dice, state: dict) -> None:
    entry = _moments(dice, state)
    value = entry[dice.choice([k for k, v in entry.items() if torch.is_tensor(v) and v.dim()])]
    value.view(-1)[dice.randrange(value.numel())] = dice.choice([float("nan"), float("-inf")])


def _moment_of_other_shape(dice: Dice, state: dict) -> None:
    entry = _moments(dice, state)
    name = dice.choice([k for k, v in entry.items() if torch.is_tensor(v) and v.dim()])
    entry[name] = torch.cat([entry[name]] * 2)


def _moment_missing(dice: Dice, state: dict) -> None:
    entry = _moments(dice, state)
    del entry[dice.choice(sorted(entry))]


def _other_optimizer(dice: Dice, state: dict) -> None:
    """Of a run with half as many numbers for each parameter."""
    for entry in state["last_optimizer_state"]["state"].values():
        for name, value in entry.items():
            if torch.is_tensor(value) and value.dim() and value.numel() > 1:
                entry[name] = value.reshape(-1)[: value.numel() // 2].clone()


def _part_missing(dice: Dice, state: dict) -> None:
    del state[dice.choice(["cfg", "model", "optimizer_history", "extra_state"])]


def _part_of_other_kind(dice: Dice, state: dict) -> None:
    name = dice.choice(["cfg", "model", "optimizer_history", "extra_state", "last_optimizer_state"])
    state[name] = dice.choice([[], "text", 3, {"a": torch.zeros(2)}, [{}]])


def _history(dice: Dice, state: dict) -> None:
    entry = state["optimizer_history"][-1]
    entry["num_updates"] = dice.choice([-3, "five", None, 2.5, float("nan"), 10**12])


def _place(dice: Dice, state: dict) -> None:
    place = state["extra_state"]["train_iterator"]
    name = dice.choice(["epoch", "iterations_in_epoch"])
    place[name] = dice.choice([-1, "one", None, 10**9])


CONTENT = (
    _not_finite,
    _other_shape,
    _transposed,
    _no_tensor,
    _weight_missing,
    _weight_too_many,
    _moment_not_finite,
    _moment_of_other_shape,
    _moment_missing,
    _other_optimizer,
    _part_missing,
    _part_of_other_kind,
    _history,
    _place,
)
KINDS: tuple[Callable, ...] = (*BYTES, *CONTENT)


def smoke() -> Iterable[int]:
    """A moment that is not finite, in one file."""
    return (len(FORMS) * KINDS.index(_moment_not_finite),)


def prepare(work: Path) -> None:
    for form in FORMS:
        _references(work, form)


@functools.cache
def _references(work: Path, form: str) -> tuple[float, dict]:
    """With the good checkpoint: the loss of evaluation; the files of a run that goes on."""
    folder = work / "cases" / f"reference-{FORMS.index(form)}"
    shutil.rmtree(folder, ignore_errors=True)
    _copy(tiny.unbroken(work, form), "checkpoint_last", folder)
    evaluated, resumed = _commands(work, form, folder)
    assert evaluated.status == 0, evaluated.output[-2000:]
    assert resumed.status == 0, resumed.output[-2000:]
    content = tiny.content(folder)
    shutil.rmtree(folder)
    return evaluated.value, content


def _copy(source: Path, name: str, folder: Path) -> Files:
    """Copy a checkpoint as the last one: its files, the main one first."""
    folder.mkdir(parents=True)
    for path in sorted(source.glob(f"{name}[.-]*")):
        target = folder / path.name.replace(name, "checkpoint_last")
        shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)
    return sorted(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.suffix != ".pt", p)
    )


@functools.cache
def _configurations(work: Path, form: str) -> tuple[Any, Any]:
    updates = str(tiny.UPDATES + MORE_UPDATES)
    training = tiny.train_arguments(
        tiny.data(work), work, *tiny.SAVING, *tiny.LAYOUTS[form], "--max-update", updates
    )
    evaluation = tiny.evaluation_arguments(tiny.data(work), work)
    return forked.configuration("eval_lm", evaluation), forked.configuration("train", training)


def _commands(work: Path, form: str, folder: Path) -> tuple[forked.Ended, forked.Ended]:
    """Evaluation, and a run that goes on, of the checkpoint in a folder."""
    evaluation, training = _configurations(work, form)

    def evaluate() -> float:
        evaluation.common_eval.path = str(folder / "checkpoint_last.pt")
        return forked.start("eval_lm", evaluation)["loss"].item()

    def resume() -> None:
        training.checkpoint.save_dir = str(folder)
        forked.start("train", training)

    limit = 2 * 2**30
    return forked.call(evaluate, 120, limit), forked.call(resume, 120, limit)


def case(seed: int, work: Path) -> Outcome:
    dice = random.Random(seed)
    form = FORMS[seed % len(FORMS)]
    kind = KINDS[seed // len(FORMS) % len(KINDS)]
    folder = folder_of(NAME, seed, work) / "run"
    files = _copy(tiny.unbroken(work, form), "checkpoint_last", folder)
    if kind in BYTES:
        before = folder.with_name("before")
        earlier = _copy(tiny.unbroken(work, form), f"checkpoint_1_{tiny.UPDATES - 1}", before)
        kind(dice, files, earlier)
    else:
        state = torch.load(files[0], weights_only=False)
        kind(dice, state)
        torch.save(state, files[0])
    loss, content = _references(work, form)
    evaluated, resumed = _commands(work, form, folder)
    found, faults = [], []
    for what, ended in (("evaluation", evaluated), ("resuming", resumed)):
        fault = disks.verdict(ended)
        if not fault and ended.status != 0:
            found.append(f"{what} refuses it")
            if "checkpoint" not in ended.error:
                fault = f"the message does not name the file: {ended.error}"
        elif not fault:
            found.append(f"harmless to {what}")
            if what == "evaluation" and evaluated.value != loss:
                fault = f"a loss of {evaluated.value}, {loss} is right"
            elif what == "resuming":
                fault = tiny.difference(tiny.content(folder), content)
        if fault:
            faults.append(f"{what}: {fault}")
    name = kind.__name__.strip("_").replace("_", " ")
    return Outcome(f"{form}, {name}: {', '.join(found)}", "; ".join(faults))
