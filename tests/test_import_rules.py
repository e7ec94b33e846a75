"""Who may import whom (docs/architecture.md), read from the sources."""

import ast
from pathlib import Path

import pytest

import evomoe_plugin

PACKAGE = Path(evomoe_plugin.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of ours, beside itself and `options`.
ALLOWED = {
    "routing": set(),
    "gates": {"routing"},
    "experts": {"routing"},
    "dispatch": {"routing"},
    "layer": {"routing", "gates", "experts", "dispatch"},
    "models": {"routing", "gates", "experts", "dispatch", "layer", "validation", "compat"},
    "criterions": {"routing", "gates", "experts", "dispatch", "layer", "models", "compat"},
    "checkpoint": {"compat"},
    "evolve": {"routing", "gates", "experts", "dispatch", "layer", "models", "compat",
               "checkpoint", "data", "validation"},
    "options": set(),
    "validation": {"gates", "dispatch"},
    "run_validation": {"gates", "validation"},
    "tasks": {"routing", "gates", "experts", "dispatch", "layer", "models", "data", "compat"},
    "generation": {"routing", "gates", "experts", "dispatch", "layer", "models", "data", "compat",
                   "checkpoint"},
    "export": {"routing", "gates", "experts", "dispatch", "layer", "models", "data", "compat",
               "checkpoint", "generation"},
    "observe": set(),
    "optim": set(),
    "compat": {"run_validation", "dispatch"},
    "data": {"compat"},
}
MAY_IMPORT_FAIRSEQ = {"models", "criterions", "tasks", "evolve", "compat", "data", "checkpoint",
                      "generation", "export", "optim", "cli", ""}


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
            assert rest[0] in ALLOWED[room] | {room, "options", "__version__"}, (
                f"{room} imports {name}")
