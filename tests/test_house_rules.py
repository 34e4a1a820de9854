"""The rules of the house that a machine can check: who may import whom, and who may read the environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("prismprune", "worker", "service")
HEAVY = {"torch", "transformers"}


def sources(package: str) -> list[Path]:
    """Every module of a package, as paths relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full dotted names that a module imports, at any depth: `a.b` for `from a import b` as well."""
    package = path.with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, node.module) if node.module else base)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    """Top-level packages that a module imports."""
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", sources("prismprune"), ids=str)
def test_the_library_knows_neither_worker_nor_service(path: Path) -> None:
    """`prismprune` can be installed by itself."""
    assert not tops(path) & {"worker", "service"}


@pytest.mark.parametrize("path", sources("worker"), ids=str)
def test_the_worker_does_not_know_the_service(path: Path) -> None:
    """The way goes from the front end to the worker, and back through Redis only."""
    assert "service" not in tops(path)


@pytest.mark.parametrize("path", sources("service"), ids=str)
def test_the_service_knows_what_both_sides_have_in_common(path: Path) -> None:
    """No torch in the front end's image: of the other packages it sees the contract, and lines of logs."""
    assert not tops(path) & {*HEAVY, "prismprune"}
    of_worker = {name for name in imported(path) if name.partition(".")[0] == "worker"}
    assert all(re.match(r"worker\.(contract|logs)(\.|$)", name) for name in of_worker)


def test_the_contract_needs_pydantic_alone() -> None:
    """Whatever speaks to the queue can import it."""
    assert tops(Path("worker/contract.py")) <= {*sys.stdlib_module_names, "pydantic"}


@pytest.mark.parametrize("package", ["prismprune", "worker.contract", "worker.logs"])
def test_importing_is_light(package: str) -> None:
    """`import prismprune` and the contract load neither torch nor transformers."""
    script = f"import sys, {package}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [path for package in PACKAGES for path in sources(package)], ids=str)
def test_only_settings_read_the_environment(path: Path) -> None:
    """Settings are one typed class a process; `os.environ` and its kin appear in modules called settings."""
    if path.name == "settings.py":
        return
    tree = ast.parse((ROOT / path).read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    from_os = {name for name in imported(path) if name.startswith("os.")}
    forbidden = {"environ", "environb", "getenv", "putenv"}
    assert not (attributes | {name.removeprefix("os.") for name in from_os}) & forbidden


def lines(node: ast.stmt) -> int:
    """How many lines a statement takes."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", [path for package in PACKAGES for path in sources(package)], ids=str)
def test_functions_are_short(path: Path) -> None:
    """A function can be read at once: 60 lines at most, its docstring included."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, functions)]
    assert [node.name for node in nodes if lines(node) > 60] == []
