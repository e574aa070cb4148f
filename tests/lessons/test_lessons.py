"""Each lesson has the parts that lessons/README.md promises, is short, and imports only the public API."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "lessons"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
ALLOWED = {"lora_blip", "lora_blip.lora.layer", "lora_blip.lora.spectrum"}
SECTIONS = ("**You learn**", "**Time:**", "**Read:**", "## Exercises", "## What to remember", "## Sources")


def code_lines(source: str) -> int:
    """Return the number of lines with code: without comments, blank lines and docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        number
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped
        for number in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def modules_of_lora_blip(source: str) -> set[str]:
    """Return the modules of lora_blip that a file imports; `from lora_blip import X` counts as lora_blip."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {name for name in modules if name.split(".")[0] == "lora_blip"}


def test_code_lines_counts_neither_text_nor_comments():
    assert code_lines('# %% [markdown]\n# text\n\nx = (\n    1\n)\n"""text"""\ndef f():\n    """doc"""\n    return x\n') == 5


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_all_parts(path):
    source = path.read_text(encoding="utf-8")
    assert source.startswith(f"# %% [markdown]\n# # {int(path.name[:2])} · ")
    assert [part for part in SECTIONS if part not in source] == []
    exercises = source.split("## Exercises")[1].split("## What to remember")[0]
    assert exercises.count("\n# 1. ") == exercises.count("\n# 2. ") == 1
    assert "show(" in source and "assert " in source
    assert code_lines(source) <= 120
    assert (FOLDER / "solutions" / path.name).is_file()


@pytest.mark.parametrize(
    "path", [*LESSONS, *sorted((FOLDER / "solutions").glob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_lesson_imports_only_the_public_api(path):
    assert modules_of_lora_blip(path.read_text(encoding="utf-8")) <= ALLOWED
