"""Who may import whom (docs/architecture.md), read from the sources."""

import ast
from pathlib import Path

import pytest

import evomoe_plugin

PACKAGE = Path(evomoe_plugin.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

CORE = {"config", "routing", "gates", "experts", "dispatch", "layer", "models"}

# What each package may import of ours, beside itself.
ALLOWED = {
    "config": {"gates", "routing", "dispatch", "patches"},
    "routing": set(),
    "gates": {"config", "routing"},
    "experts": {"config", "routing"},
    "dispatch": {"config", "routing", "experts"},
    "layer": {"config", "routing", "gates", "experts", "dispatch"},
    "models": CORE,
    "criterions": CORE,
    "tasks": CORE | {"data"},
    "optim": set(),
    "data": {"config"},
    "metrics": {"config"},
    "checkpoint": CORE | {"patches", "trainer"},
    "evolve": CORE | {"checkpoint", "data", "trainer"},
    "trainer": CORE | {"checkpoint", "patches"},
    "generation": CORE | {"checkpoint", "data"},
    "export": CORE | {"checkpoint", "data", "generation"},
    "launch": {"checkpoint", "config", "patches"},
    "patches": CORE | {"checkpoint", "launch", "trainer"},
}
MAY_IMPORT_FAIRSEQ = {"models", "criterions", "tasks", "evolve", "patches", "data", "checkpoint",
                      "generation", "export", "optim", "cli", "config", "launch", "trainer", ""}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py") if relative != Path("__init__.py") else ""


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_stands_below_them(path):
    room = room_of(path)
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top in ("fairseq", "fairseq_cli", "fairscale"):
            assert room in MAY_IMPORT_FAIRSEQ, f"{room} imports {name}"
        if top == "evomoe_plugin" and rest and room in ALLOWED:
            assert rest[0] in ALLOWED[room] | {room, "__version__"}, (
                f"{room} imports {name}")
