"""Each lesson has the parts that lessons/README.md promises, is short, and imports only the public API."""

import ast
import importlib
import io
import json
import re
import tokenize
from pathlib import Path

import matplotlib
import pytest
import torch

import lora_blip
from lessons import __main__ as runner
from lessons import spread
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.caption import CaptionTask

FOLDER = Path(__file__).resolve().parents[2] / "lessons"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
ALLOWED = {"lora_blip", "lora_blip.lora.layer", "lora_blip.lora.spectrum"}
SECTIONS = ("**You learn**", "**Time:**", "**Read:**", "## Exercises", "## What to remember", "## Sources")


def lesson_tools(monkeypatch):
    """Import lessons/lesson_tools.py. Other tests keep their style of figures."""
    monkeypatch.syspath_prepend(str(FOLDER))
    with matplotlib.rc_context():
        return importlib.import_module("lesson_tools")


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
    assert source.count("\n# %%\n") >= 3 and source.count("# %% [markdown]\n") >= 3
    solution = FOLDER / "solutions" / path.name
    assert solution.read_text(encoding="utf-8").startswith("# %% [markdown]\n") and "assert " in solution.read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "path", [*LESSONS, *sorted((FOLDER / "solutions").glob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_lesson_imports_only_the_public_api(path):
    assert modules_of_lora_blip(path.read_text(encoding="utf-8")) <= ALLOWED


OF_TOKENIZER = {"convert_ids_to_tokens", "convert_tokens_to_ids"}  # names of tokens, and no ids of a whole caption


def uses_of_the_tokenizer(source: str) -> list[str]:
    """Return the lines that use a tokenizer or a processor for more than the names of tokens."""
    tree = ast.parse(source)
    named = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in OF_TOKENIZER}
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"tokenizer", "processor"} and id(node) not in named
    ]
    return [ast.unparse(node) for node in found]


@pytest.mark.parametrize(
    "path", [*LESSONS, *sorted((FOLDER / "solutions").glob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_only_lesson_tools_makes_token_ids(path):
    """BLIP's tokenizer starts a caption with [CLS], and a training with [DEC]: `lesson_tools.tokenize` corrects this."""
    source = path.read_text(encoding="utf-8")
    assert uses_of_the_tokenizer(source) == []
    assert not re.search(r"Tokenizer|Processor|getattr\(.*token", source)
    assert uses_of_the_tokenizer("ids = backbone.tokenizer(texts).input_ids") == ["backbone.tokenizer"]
    assert uses_of_the_tokenizer("encode = base.tokenizer") == ["base.tokenizer"]
    assert uses_of_the_tokenizer("base.tokenizer.convert_tokens_to_ids('cube')") == []


def test_every_lesson_loads_its_base_on_the_cpu():
    """By default a base is loaded on a GPU, if there is one. The tensors of the lessons are on the CPU."""
    calls = 0
    for path in (*LESSONS, *FOLDER.glob("solutions/*.py"), FOLDER / "lesson_tools.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("load_backbone", "from_adapter")):
                given, calls = {each.arg: ast.unparse(each.value) for each in node.keywords}, calls + 1
                assert given.get("device") == "'cpu'" or given.get("base") == "backbone", f"{path.name}:{node.lineno}"
    assert calls > 20


def test_the_captions_of_a_lesson_are_those_of_a_training(monkeypatch):
    """`lesson_tools.tokenize` gives the input ids, the mask and the labels of the captioning task."""
    tools = lesson_tools(monkeypatch)
    backbone = lora_blip.load_backbone(str(FOLDER.parent / "assets/tiny-blip"))
    captions = ["a red cube", tools.cubes(1)[1][0]]
    rows = CaptionTask(backbone).language.tokenize(["", ""], captions).pad()
    for tokens in (tools.tokenize(backbone, captions), tools.tokenize(backbone, captions, length=16)):
        width = rows.input_ids.shape[1]
        assert torch.equal(tokens.input_ids[:, :width], rows.input_ids)
        assert torch.equal(tokens.attention_mask[:, :width], rows.attention_mask)
        assert torch.equal(tokens.labels[:, 1:width], rows.targets[:, :-1])  # BLIP predicts token t + 1 at position t
        assert not tokens.attention_mask[:, width:].any() and (tokens.labels[:, width:] == IGNORE).all()
    assert tokens.input_ids.shape == (2, 16)


def test_every_lesson_is_in_the_lists():
    """lessons/README.md lists the file of each lesson, and docs/learn.md its number and title."""
    files = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in LESSONS if f"`{path.name}`" not in files] == []
    rows = (FOLDER.parent / "docs" / "learn.md").read_text(encoding="utf-8").splitlines()
    assert [path.name for path in LESSONS if not any(f"{int(path.name[:2])} · " in row for row in rows)] == []


def unknown_names(text: str, folder: Path) -> list[str]:
    """Return the names in backticks that are neither a file in `folder` nor a name in one of the Python files of the text."""
    names = re.findall(r"`([\w./]+)`", text)
    sources = [(folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()]
    code = "\n".join(sources)
    return [name for name in names if not (folder / name).is_file() and not re.search(rf"\b{name.split('.')[-1]}\b", code)]


def test_the_code_that_the_reading_order_names_exists():
    """Each file and each name after **Read:** in a lesson, and in the table of docs/learn.md, is in the repository."""
    root = FOLDER.parent
    texts = {path.name: path.read_text(encoding="utf-8").split("**Read:**")[1].split("\n#\n")[0] for path in LESSONS}
    assert {name: unknown_names(text, root) for name, text in texts.items() if unknown_names(text, root)} == {}
    rows = [row for row in (root / "docs" / "learn.md").read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    assert len(rows) == 1 + len(LESSONS)
    assert [row for row in rows[1:] if unknown_names(row, root / "lora_blip")] == []
    assert unknown_names("`lora/layer.py` `LoRA` `no_such_name`", root / "lora_blip") == ["no_such_name"]


RECORDS = [
    {"lesson": "05_rank", "seed": seed, "name": "exact match", "value": value}
    for seed, value in ((0, 0.5), (1, 1.0), (2, 0.75))
]


def test_the_table_of_three_seeds_has_a_row_for_each_number():
    assert spread.rows(RECORDS) == ["| 05_rank | exact match | 0.5 | 1 | 0.75 | 0.5 |"]
    assert spread.rows(RECORDS[1:]) == ["| 05_rank | exact match | – | 1 | 0.75 | 0.25 |"]


def test_lessons_that_are_not_run_again_keep_their_rows():
    old = spread.merged("", ["| 05_rank | old | 1 | 1 | 1 | 0 |", "| 11_side_effects | kept | 1 | 1 | 1 | 0 |"], ("05", "11"))
    new = spread.merged(old, spread.rows(RECORDS), ("05",))
    assert new.startswith(spread.TITLE) and "kept" in new and "old" not in new and "| 05_rank | exact match |" in new


@pytest.mark.parametrize(("code", "line"), [("x = 1\nassert x == 1", "ok"), ("x = 1\nassert x == 2", "failed")])
def test_the_runner_reports_a_failed_assertion(code, line, tmp_path, monkeypatch, capsys):
    """A script that fails is named, its traceback is printed, and the exit code is 1."""
    (tmp_path / "01_lesson.py").write_text(code)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["lessons"])
    with pytest.raises(SystemExit) as end:
        runner.main()
    output = capsys.readouterr().out
    assert end.value.code == (line == "failed")
    assert f"s  {line}" in output and ("AssertionError" in output) == (line == "failed")


def test_the_records_and_images_of_a_lesson(tmp_path, monkeypatch, capsys):
    """`record` prints, and appends a line with the lesson, the seed, the name and the value. `cubes` reads pairs."""
    tools = lesson_tools(monkeypatch)
    monkeypatch.setenv("LESSON_RECORD", str(tmp_path / "records.jsonl"))
    tools.record("loss", 0.25)
    assert capsys.readouterr().out == "loss: 0.25\n"
    (line,) = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert (line["seed"], line["name"], line["value"]) == (tools.SEED, "loss", 0.25)
    images, captions = tools.cubes(2)
    assert captions[0] == "a green cube on top of an orange cube" and images[0].size == (96, 96)
    assert len(tools.test_cubes()[1]) == 160
