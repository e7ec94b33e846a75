"""Who may import whom (docs/architecture.md), read from the sources."""

import ast
import graphlib
from pathlib import Path

import pytest

import evomoe_plugin

PACKAGE = Path(evomoe_plugin.__file__).parent
REMOTE = PACKAGE / "export/remote"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The options themselves and the errors lie below all, their checks above the gates.
BASE = {
    "config.errors",
    "config.options",
    "config.values",
    "config.rates",
    "config.moe_layers",
    "config.stacks",
    "config.hf_config",
}
LAYER = BASE | {"routing", "gates", "experts", "dispatch", "layer"}
MODEL = LAYER | {"models", "config.checks", "config.dataclass_fields"}

# What each package may import of ours, beside itself.
ALLOWED = {
    "config.errors": set(),
    "config.options": set(),
    "config.values": {"config.errors"},
    "config.rates": {"config.errors", "config.options", "config.values"},
    "config.moe_layers": {"config.errors", "config.options"},
    "config.stacks": {"config.options", "config.moe_layers"},
    "config.hf_config": {"config.errors", "config.options", "config.moe_layers"},
    "config.dataclass_fields": set(),
    "config.terminal": set(),
    "config.checks": BASE | {"gates", "dispatch"},
    "config.evaluation_checks": BASE,
    "config.fairseq_checks": {"config.errors"},
    "config.published_flags": {"config.errors"},
    "config.run_checks": BASE
    | {"gates", "config.checks", "config.evaluation_checks", "config.fairseq_checks"},
    "routing": set(),
    "gates": BASE | {"routing"},
    "experts": BASE | {"routing"},
    "dispatch": BASE | {"routing", "experts"},
    "layer": LAYER - {"layer"},
    "layer_keywords": set(),
    "standalone": LAYER | {"config.checks", "layer_keywords"},
    "models": MODEL,
    "criterions": MODEL,
    "tasks": MODEL | {"data"},
    "optim": LAYER | {"models"},
    "data": BASE | {"checkpoint.atomic_files"},
    "metrics": BASE,
    "checkpoint.atomic_files": {"config.errors"},
    "checkpoint": BASE | {"dispatch", "checkpoint.atomic_files"},
    "trainer": LAYER | {"checkpoint", "optim"},
    "evaluation": BASE | {"dispatch"},
    "evolve": MODEL | {"checkpoint", "data", "evaluation", "trainer"},
    "generation": MODEL | {"checkpoint", "data"},
    "export": MODEL | {"checkpoint", "data", "generation"},
    "report": MODEL | {"checkpoint", "data", "evolve", "generation", "metrics"},
    "patches": BASE | {"checkpoint", "dispatch", "quiet_imports"},
    "quiet_imports": set(),
    "launch": BASE
    | {
        "checkpoint",
        "config.evaluation_checks",
        "config.published_flags",
        "config.run_checks",
        "config.terminal",
        "evaluation",
        "patches",
        "trainer",
    },
}
KNOW_NOTHING_OF_FAIRSEQ = {
    "config.errors",
    "config.options",
    "config.values",
    "config.rates",
    "config.moe_layers",
    "config.stacks",
    "config.hf_config",
    "config.checks",
    "config.evaluation_checks",
    "config.fairseq_checks",
    "config.published_flags",
    "config.run_checks",
    "routing",
    "gates",
    "experts",
    "dispatch",
    "layer",
    "layer_keywords",
    "standalone",
    "metrics",
    "quiet_imports",
}


def dotted(path: Path) -> str:
    """`gates.top_k` of evomoe_plugin/gates/top_k.py; "" of the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def package_of(module: str) -> str:
    """The key of `ALLOWED` that a module is of: its file, if that is one, or its folder."""
    parts = module.split(".")
    file = ".".join(parts[:2])
    return file if parts[0] == "config" or file in ALLOWED else parts[0]


def imports_of(path: Path, typing_only: bool = True, deferred: bool = True) -> set[str]:
    """Full names of what a file imports.

    Args:
        typing_only: those under `if TYPE_CHECKING` too.
        deferred: those inside of functions too.
    """
    names = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Exported folders hold the files of `export/remote`, which find each other by place.
            assert node.level == 0 or path.parent == REMOTE, f"{path}: relative import"
            module = f"evomoe_plugin.export.remote.{node.module}" if node.level else node.module
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            if typing_only:
                for child in node.body:
                    visit(child)
        elif deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_packages_import_only_what_lies_below_them(path):
    package = package_of(dotted(path))
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top in ("fairseq", "fairseq_cli", "fairscale"):
            assert package not in KNOW_NOTHING_OF_FAIRSEQ, f"{package} imports {name}"
        if top == "evomoe_plugin" and rest and package in ALLOWED:
            imported = package_of(rest)
            allowed = ALLOWED[package] | {package, "__version__"}
            assert imported in allowed or imported.partition(".")[0] in allowed, (
                f"{package} imports {name}"
            )


def test_there_is_no_circle_of_imports():
    modules = {dotted(path) for path in MODULES} - {""}
    graph = {}
    for path in MODULES:
        found = set()
        for name in imports_of(path, deferred=False):
            inner = name.removeprefix("evomoe_plugin.")
            if inner != name:
                found.add(inner if inner in modules else inner.rpartition(".")[0])
        graph[dotted(path)] = found & modules - {dotted(path)}
    # A package's own file lists its modules, which may import from its folder.
    folders = {dotted(path) for path in MODULES if path.name == "__init__.py"}
    for module, found in graph.items():
        found -= {folder for folder in folders if module.startswith(f"{folder}.")}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
