"""The structure of the package: which file may import which, and how many files and names there are."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import lora_blip
from benchmarks.studies import code_map

PACKAGE = Path(__file__).resolve().parent.parent / "lora_blip"
LOW = ["errors", "version"]
TASKS = [*LOW, "kernels", "runtime", "lora", "models", "data", "metrics", "config"]
RUNS = [*TASKS, "tasks", "reports"]
ALLOWED = {  # package or file → what it may import, at the top of a file or later
    "errors": [], "version": [], "metrics": LOW, "runtime": LOW, "kernels": LOW,
    "config": [*LOW, "runtime"], "flags": [*LOW, "runtime"],
    "lora": [*LOW, "kernels", "runtime"],
    "data": [*LOW, "runtime", "data.prepare"], "data.prepare": [*LOW, "runtime", "data", "config"],
    "models": [*LOW, "lora", "kernels", "runtime", "config"],
    "tasks": TASKS,
    "reports": [*LOW, "data", "metrics", "runtime"],
    "training": RUNS, "inference": RUNS, "evaluation": [*RUNS, "inference"],  # training and inference: never each other
    "conversion": [*LOW, "runtime", "lora", "models", "metrics"],
    "inspection": [*LOW, "runtime", "lora", "models", "metrics", "reports"],
    "doctor": RUNS,
    "cli": ["*"], "__main__": ["*"], "": ["*"],
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Return {dotted name without the package: file}; the name of an `__init__` is that of its package."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        paths["" if name == "__init__" else name.removesuffix(".__init__")] = path
    return paths


def package_of(module: str) -> str:
    """Return the entry of ALLOWED that a module belongs to."""
    return max((entry for entry in ALLOWED if module == entry or module.startswith(f"{entry}.") or not entry), key=len)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each module of the package that a file imports, in functions too."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            for name in [f"{node.module}.{alias.name}" for alias in node.names]:
                if name.startswith("lora_blip"):
                    inner = name.removeprefix("lora_blip").strip(".")
                    yield node.lineno, inner if inner in known else inner.rpartition(".")[0]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lora_blip":
                    yield node.lineno, alias.name.removeprefix("lora_blip").strip(".")


@pytest.mark.parametrize("module", [name for name in modules() if name not in ("cli", "__main__")])
def test_a_file_imports_only_what_its_package_may(module: str) -> None:
    """`__init__` files contain only a docstring or the API, and no file imports that of its own package."""
    path, package = modules()[module], package_of(module)
    for line, other in imports(path):
        assert not (module and module.startswith(f"{other}.")), f"{path}:{line} imports the __init__ of its own package"
        allowed = [package, *ALLOWED[package]]
        assert "*" in allowed or package_of(other) in allowed, f"{path}:{line} imports {other}; {package} may import {allowed}"


def test_every_package_has_an_entry() -> None:
    assert {name.split(".")[0] for name in modules()} == {name.split(".")[0] for name in ALLOWED}


def test_the_root_has_at_most_eight_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("package", ["tasks", "models"])
def test_no_method_only_raises_not_implemented(package: str) -> None:
    """A method that each subclass must have is abstract, so that a class without it cannot be made."""
    for path in (PACKAGE / package).glob("*.py"):
        assert "NotImplementedError" not in path.read_text(encoding="utf-8"), path


def test_no_two_classes_share_a_name() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules().values()]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_files_and_functions_are_short() -> None:
    """A file is read in one sitting, a function on one screen, and the first file on LoRA on two pages."""
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > (120 if name == "lora.layer" else 300)} == {}
    functions = {
        f"{name}:{node.name}": node.end_lineno - node.lineno + 1
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: length for name, length in functions.items() if length > 60} == {}


def test_the_code_map_is_what_its_command_writes() -> None:
    page = (PACKAGE.parent / "docs" / "code_map.md").read_text(encoding="utf-8")
    assert code_map.page() == page, "run: python -m benchmarks.studies.code_map"


@pytest.mark.parametrize(("fast", "most"), [(False, 18), (True, 26)])
def test_one_caption_passes_few_files(fast, most):
    """From its line in the annotation file to the gradient of A: a reader of the whole path opens no more files."""
    files = code_map.caption_path(fast)
    assert "lora/layer.py" in files or fast
    assert len(files) <= most, "\n".join(files)


@pytest.mark.parametrize("name", [*lora_blip.EXPORTS, "__version__"])
def test_every_name_of_the_api_is_there(name: str) -> None:
    """It is what its module has, and dir() lists it."""
    assert name in dir(lora_blip)
    module, _, own = lora_blip.EXPORTS.get(name, "version").partition(":")
    assert getattr(lora_blip, name) is getattr(import_module(f"lora_blip.{module}"), own or name)


def test_the_package_imports_nothing_large_at_first() -> None:
    code = "import sys, lora_blip; raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0
    with pytest.raises(AttributeError, match="nonsense"):
        lora_blip.nonsense  # noqa: B018
