"""The rules of the house that a program can check; CONTRIBUTING.md lists them, and the tests that hold the others."""

import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("pixelgen_fast", "kernels", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ".venv" not in path.parts
]
LONGEST = 500
LATER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def comments(text: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT]


def is_statement(comment: str) -> bool:
    """Whether a comment is a statement that was put out of use: words alone are an expression or no Python."""
    try:
        body = ast.parse(comment).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Assign | ast.Import | ast.ImportFrom | ast.Return) for node in body)


def test_every_module_says_what_it_is() -> None:
    ours = [path for path in FILES if "tests" not in path.relative_to(ROOT).parts]
    silent = [
        str(path) for path in ours if (text := path.read_text()).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_nothing_is_swallowed_or_left_for_later() -> None:
    found = []
    for path in FILES:
        text = path.read_text()
        bare = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ExceptHandler) and n.type is None]
        found += [f"{path}:{node.lineno}: a bare except" for node in bare]
        found += [f"{path}: {line}" for line in comments(text) if LATER.search(line) or is_statement(line)]
    assert found == []


@pytest.mark.parametrize("planted", ["x = 1  # TODO: later", "# y = f(x)", "# import os"])
def test_what_is_planted_is_found(planted: str) -> None:
    assert any(LATER.search(line) or is_statement(line) for line in comments(planted))


def test_contracts_on_imports_are_run_by_continuous_integration() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "lint-imports" in script and "ruff check ." in script
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    walls = {name for contract in contracts for name in contract.get("forbidden_modules", [])}
    assert {"deepspeed", "nvidia", "pyarrow", "huggingface_hub", "diffusers", "wandb"} <= walls
    packages = {path.name for path in (ROOT / "pixelgen_fast").iterdir() if (path / "__init__.py").is_file()}
    layers = " ".join(layer for contract in contracts for layer in contract.get("layers", []))
    assert [name for name in sorted(packages) if f"pixelgen_fast.{name}" not in layers.replace("|", " ").split()] == []
