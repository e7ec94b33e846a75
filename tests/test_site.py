"""The documentation's site: its pages agree with the code, and with each other."""

import ast
import inspect
import itertools
import re
import runpy
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from evomoe_plugin.gates import gate_class, gate_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "evomoe_plugin"
PUBLIC = re.findall(r"^::: (.+)$", (ROOT / "docs/api.md").read_text(), re.M)


# The public API


def test_modules_with_a_list_of_names_are_the_public_ones():
    listed = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^__all__ = ", path.read_text(), re.M)
    }
    assert listed == set(PUBLIC)


def undocumented(name: str, value: object) -> list[str]:
    """Names without a docstring: functions, classes, and what a class of ours has of its own."""
    found = [] if inspect.getdoc(value) else [name]
    if not inspect.isclass(value):
        return found
    fields = vars(value).get("__annotations__", {})
    of_class = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0].body
    described = {
        before.target.id
        for before, after in itertools.pairwise(of_class)
        if isinstance(before, ast.AnnAssign)
        and isinstance(getattr(after, "value", None), ast.Constant)
    }
    in_help = {n for n in fields if hasattr(getattr(value, n, None), "metadata")}
    for own, member in vars(value).items():
        member = getattr(member, "__func__", member)
        if not own.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            found += [] if inspect.getdoc(getattr(value, own)) else [f"{name}.{own}"]
    return found + [f"{name}.{n}" for n in fields if n not in described | in_help and n[0] != "_"]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_documented(module):
    names = import_module(module).__all__
    missing = [
        one
        for name in names
        for one in undocumented(name, getattr(import_module(module), name))
        # Flags, which `evomoe prepare --help` and `fairseq-train --help` describe.
        if not one.startswith(("PrepareOptions.", "ScorerOptions."))
    ]
    assert missing == []


# Pages and code


def templates() -> set[str]:
    """Every text in the package, `…` for what is filled in; errors as they are printed."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return re.sub(r"%[sdg]|%\.\d[fg]", "…", node.value)
        if isinstance(node, ast.JoinedStr):
            return re.sub("……+", "…", "".join(text(part) for part in node.values))
        return "…"

    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                found.add(text(node))
            if getattr(getattr(node, "func", None), "id", "") == "OptionError":
                option, value, remedy = map(text, node.args)
                lower = re.fullmatch(r"[a-z0-9_]+", option)
                flag = "--" + option.replace("_", "-") if lower else option
                found.add(f"{flag} {value}: {remedy}")
    return found


def test_messages_explained_are_messages_of_the_package():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    explained = re.findall(r"^\*\*(?:`([^`]+)`|``(.+)``)\*\*$", page, re.M)
    known = templates()
    assert len(explained) > 30
    assert [
        one for pair in explained for one in pair if one and not any(one in text for text in known)
    ] == []


@pytest.mark.parametrize(
    "name", [n for n in gate_names() if gate_class(n).__module__.startswith("evomoe_plugin.")]
)
def test_every_gate_has_a_formula(name):
    page = (ROOT / "docs/gates.md").read_text()
    assert re.search(rf"^### {name}\n\n\$\$.+\$\$\n", page, re.M)


def test_the_tour_explains_the_commands_of_the_readme():
    blocks = [
        re.findall(r"^```\n(.+?)^```", (ROOT / page).read_text(), re.M | re.S)
        for page in ("README.md", "docs/tour.md")
    ]
    commands = blocks[0][1].strip().split("\n\n")
    assert len(commands) == 3
    assert [block.strip() for block in blocks[1][:3]] == commands


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_pictures_are_those_that_the_code_draws(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs/pictures/draw.py"))["draw"]
    draw(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "docs/pictures").glob("*.svg")}
    assert drawn == kept
