"""The README and the pages of docs/: every link, path, setting, command and snippet in them works."""

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lora_blip.cli import COMMANDS, run_command, run_infer, run_train
from lora_blip.config import InferConfig, TrainConfig
from lora_blip.flags import parse
from lora_blip.lora import layer
from lora_blip.lora.sites import Site

ROOT = Path(__file__).resolve().parent.parent
README, LAWS = ROOT / "README.md", ROOT / "docs" / "laws.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]
GENERATED = "code_map.md"
SCRIPTS = {"train.py": TrainConfig, "infer.py": InferConfig}
SETTINGS = {field.name for command in COMMANDS.values() for field in fields(command.settings())}
PLACEHOLDERS = (  # files of the reader that pages name; the tests make them
    "my/annotations.jsonl", "my/test.jsonl", "my/photos/000.png", "my/new_photos/000.png",
    "photos/0001.jpg", "photo.jpg", "captions.tsv", "list.txt",
    "list.jsonl", "coco/annotations/captions_train2017.json", "coco/annotations/captions_val2017.json",
    "Flickr8k_text/captions.txt", "Flicker8k_Dataset/0.jpg", "shards/0000.tar",
)  # fmt: skip
WRITTEN = (  # files and folders that commands write
    "adapter.safetensors", "best.safetensors", "config.json", "metrics.jsonl", "metrics.json", "loss.png", "report.html",
    "comparison.csv", "base.jsonl", "adapted.jsonl", "predictions.jsonl", "errors.jsonl", "dropped.jsonl", "train.jsonl",
    "val.jsonl", "test.jsonl", "gallery.html", "explain.html", "inspect.html", "lora_blip_output/", "OUTPUT_DIR/.cache",
    "docs/_build/html", "docs/_build/notebooks", "paths.json",
)  # fmt: skip
FOREIGN = (
    "metadata.csv",
    "adapter_model.safetensors",
    "adapter_config.json",
    "model.safetensors",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "user/name",
    "metadata.jsonl",
    "dataset_*.json",
    "captions.txt",
    "results.csv",
    "meta_cap.json",
    "captions_val2017.json",
    ".tsv",
    "list.jsonl",
)  # of other projects
OTHER_CAPITALS = {"OMP_NUM_THREADS"}


class Block(NamedTuple):
    """A fenced block of a page, with the line of its first line."""

    page: Path
    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S)
    every = [Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[3]) for match in matches]
    return [block for block in every if not languages or block.language in languages]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository root of a reader who follows the README, with the reader's own files."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "lora_blip_output":
            (folder / path.name).symlink_to(path)
    for name in PLACEHOLDERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            shutil.copy(ROOT / "image_test" / "000.png", path)
        else:
            path.touch()
    lines = [json.loads(line) for line in (ROOT / "annotations.jsonl").read_text().splitlines()[:12]]
    text = "".join(json.dumps({**line, "image": str(ROOT / line["image"])}) + "\n" for line in lines)
    for name in ("my/annotations.jsonl", "my/test.jsonl"):
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    return checkout


@pytest.fixture(scope="module")
def trained(checkout: Path) -> Path:
    """The reader's first run: the settings that the README writes into train.py, on an embedded base, for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setattr("sys.argv", ["train.py", "--model", "assets/tiny-blip", "--max-steps", "2", "--device", "cpu"])
        run_train(edited_settings(), "")
    return checkout


def edited_settings() -> dict[str, Any]:
    """Return the settings of the README's edited train.py."""
    (block,) = [block for block in blocks(README, "python") if block.text.startswith("MODEL = ")]
    settings: dict[str, Any] = {}
    exec(block.text, settings)
    return {name: value for name, value in settings.items() if name.isupper()}


# ---------------------------------------------------------------- form


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 1000


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_a_page_asks_one_question_and_answers_it_first(page):
    """The title is a question, and the first paragraph is the shortest answer, in bold."""
    if page.name in (GENERATED, "python_api.md"):
        return
    title, _, first, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and title.endswith("?")
    assert first.startswith("**")


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(other), f"{page}: {target} is not one of {sorted(anchors(other))}"


def test_every_page_can_be_reached_from_the_readme():
    visited, left = set(), [README]
    while left:
        page = left.pop()
        visited.add(page)
        links = [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)", prose(page))]
        left += [link for link in links if link not in visited and link.is_file()]
    assert set(PAGES) <= visited


@pytest.mark.parametrize("page", LINKED[: len(PAGES)], ids=name_of)
def test_every_path_and_setting_in_the_text_exists(page, checkout):
    for code in inline(page):
        is_path = re.fullmatch(r"[\w.*{}-]*/[\w./*{}-]*|[\w*-]*\.(py|md|jsonl?|csv|tsv|txt|png|html|safetensors)", code)
        if is_path and not code.startswith(("Salesforce/", "~")) and code not in (*WRITTEN, *FOREIGN, "layer.py"):
            places = [checkout, checkout / "lora_blip", page.parent]
            assert any(list(place.glob(re.sub(r"\{.*?\}", "*", code))) for place in places), f"{page}: {code}"
        if re.fullmatch(r"[A-Z]+(_[A-Z]+)*( = .+)?", code):
            name = code.split(" = ")[0]
            assert name.lower() in SETTINGS or name in OTHER_CAPITALS or len(name) == 1, f"{page}: {name}"


# ---------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[str]:
    """Yield every shell command of a page, in blocks and in the text."""
    for block in blocks(page, "sh"):
        yield from (line for line in block.text.replace("\\\n", " ").splitlines() if line and not line.startswith("#"))
    starts = "make ", "pip ", "python ", "python3 ", "lora-blip ", "torchrun ", "--"
    yield from (code for code in inline(page) if code.startswith(starts))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one_that_its_program_accepts(page, here):
    """Each flag is parsed by the program's own parser, and each path exists."""
    for command in commands(page):
        accept(command, here)


def accept(command: str, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    words = words[1:] if words[0] == "srun" else words
    program, arguments = Path(words[0]).name, words[1:]
    if program.startswith("--"):
        assert program.removeprefix("--").partition("=")[0].replace("-", "_") in SETTINGS | {"max_restarts"}, command
    elif program == "make":
        assert {word for word in arguments if "=" not in word} <= set(
            re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        ), command
    elif program == "pip":
        check_install(arguments, command)
    elif program == "source":
        assert arguments == [".venv/bin/activate"]
    elif program == "export":
        assert re.fullmatch(r"[A-Z_]+=\d", arguments[0])
    elif program == "torchrun":
        for script in {"train.py", "infer.py"} & set(arguments):  # in the text there may be only torchrun's own flags
            accept_script(arguments[arguments.index(script) :], folder, command)
    elif program == "lora-blip":
        accept_ours(arguments, command)
    elif program in ("python", "python3") and arguments[0] == "-m":
        accept_module(arguments[1:], command)
    elif program in ("python", "python3"):
        accept_script(arguments, folder, command)
    else:
        raise AssertionError(f"an unknown program: {command}")


def accept_script(words: list[str], folder: Path, command: str) -> None:
    script, *flags = words
    assert (folder / script).is_file(), command
    if script.startswith("lessons/"):
        assert not flags, f"a lesson has no flags: {command}"
        return
    config = parse(SCRIPTS[script], {}, flags)
    check_paths(config, flags, command)


def accept_ours(words: list[str], command: str) -> None:
    name, *flags = words
    assert name in COMMANDS, command
    check_paths(parse(COMMANDS[name].settings(), {}, flags), flags, command)


def accept_module(words: list[str], command: str) -> None:
    """A module exists. Its flags are in its source, if its parser cannot be called alone."""
    module, *rest = words
    if module == "lora_blip":
        accept_ours(rest, command)
        return
    assert find_spec(module), command
    if module == "venv":
        return
    if module == "pytest":
        path, _, name = rest
        assert name in (ROOT / path).read_text(), command
        return
    spec: Any = find_spec(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
    source = Path(spec.origin).read_text()
    for flag in (word for word in rest if word.startswith("--")):
        of_train = module == "toyworld.demo" and flag[2:].replace("-", "_") in SETTINGS
        assert f'"{flag}"' in source or of_train, command
    for word in rest[:1]:
        assert word.startswith("--") or word in source, command


def check_install(arguments: list[str], command: str) -> None:
    assert arguments[0] == "install", command
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        for extra in re.findall(r"\[(.+)\]", word):
            assert extra in extras, command
    assert "-c" not in arguments or (ROOT / arguments[arguments.index("-c") + 1]).is_file(), command


def check_paths(config: Any, flags: list[str], command: str) -> None:
    """Every input that the command names exists; the reader's files are made by `checkout`."""
    inputs = {"annotations", "references", "source", "image", "images", "val_annotations", "train_annotations"}
    for name in inputs & {field.name for field in fields(config)}:
        value = getattr(config, name)
        if value in flags or isinstance(value, list):
            for path in value if isinstance(value, list) else value.split(","):
                assert list(Path().glob(re.sub(r"\{.*?\}", "*", path))), f"{command}: {path} does not exist"
    model = getattr(config, "model", "")
    assert not model.startswith("assets/") or Path(model).is_dir(), command


# ---------------------------------------------------------------- snippets


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        space = dict(vars(layer)) if block.text.startswith("class LoRA") else names
        try:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), space)
        except Exception as error:
            raise AssertionError(f"{page}:{block.line}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_of_python_that_sets_settings_is_a_valid_train_py(page):
    for block in blocks(page, "python"):
        if re.match("[A-Z_]+ = ", block.text):
            settings: dict[str, Any] = {}
            exec(block.text, settings)
            parse(TrainConfig, {name: value for name, value in settings.items() if name.isupper()}, [])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_json_line_is_json_with_known_keys(page):
    known = {"image", "text", "question", "answers", "prompt", "group", "question_id"}
    for block in blocks(page, "json"):
        for line in block.text.splitlines():
            assert set(json.loads(line)) <= known, f"{page}:{block.line}"


def test_the_first_hour_of_a_reader(trained, monkeypatch):
    """The README's three commands on the reader's own photos: train.py as edited, infer.py, evaluate."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("PATH", "")  # no Java: its caption scores take 20 s
    (block,) = [block for block in blocks(README, "sh") if block.text.startswith("python train.py\n")]
    _, infer, evaluate = map(shlex.split, block.text.splitlines())
    monkeypatch.setattr("sys.argv", [*infer[1:], "--device", "cpu", "--output-dir", "captions"])
    run_infer({}, "")
    assert len((trained / "captions" / "predictions.jsonl").read_text().splitlines()) == 1
    (trained / "captions.tsv").write_text("my/photos/000.png\ta red cube\n")
    run_command("prepare", ["--source", "captions.tsv", "--splits", "1"])  # the first command of docs/prepare.md
    assert json.loads((trained / "prepared" / "train.jsonl").read_text())["text"] == "a red cube"
    run_command("caption", ["image_test/000.png", "--device", "cpu"])
    run_command(evaluate[1], [*evaluate[2:], "--device", "cpu", "--output-dir", "scores"])
    assert (trained / "scores" / "report.html").is_file()


def test_the_lora_of_the_readme_is_the_one_that_runs():
    """Its lines are lines of layer.py, in the same order, and it computes the same."""
    (block,) = [block for block in blocks(README, "python") if block.text.startswith("class LoRA")]
    source = iter((ROOT / "lora_blip/lora/layer.py").read_text().splitlines())
    lines = [line for line in block.text.splitlines() if line]
    assert len(lines) <= 20
    for line in lines:
        assert line in source, f"not in layer.py, or in another order: {line}"
    names = dict(vars(layer))
    exec(block.text, names)
    site = Site("fc", r=2, alpha=8.0)
    shown, real = names["LoRA"](site, 5, 3), layer.LoRA(site, 5, 3)
    torch.nn.init.normal_(real.B)
    shown.load_state_dict(real.state_dict())
    x, linear = torch.randn(4, 5), torch.nn.Linear(5, 3)
    linear.lora = layer.AdapterStack()
    linear.lora["default"] = real
    assert torch.equal(shown(x), real(x)) and real(x).abs().sum() > 0
    y = linear(x)
    assert torch.equal(names["lora_hook"](linear, (x,), {}, y), layer.lora_hook(linear, (x,), {}, y))


# ---------------------------------------------------------------- laws


def test_laws_have_one_numbering():
    """docs/laws.md, tests/README.md and "Law 7" in a test mean the same law."""
    rows = re.findall(r"^\| (\d+)\. (.+?) \| (.+?) \|$", (ROOT / "tests" / "README.md").read_text(), re.M)
    listed = {int(number): (title, re.findall(r"`([\w/]+\.py)`", files)) for number, title, files in rows}
    headings = {int(number): title for number, title in re.findall(r"^## (\d+)\. (.+)$", LAWS.read_text(), re.M)}
    assert list(headings) == list(range(1, 14)) == list(listed)
    assert {number: title for number, (title, _) in listed.items()} == headings
    for path in (ROOT / "tests").rglob("test_*.py"):
        for number in map(int, re.findall(r"\b[Ll]aw (\d+)", path.read_text())) if path != Path(__file__) else ():
            assert str(path.relative_to(ROOT / "tests")) in listed[number][1], f"{path}: law {number}"


def test_each_law_has_a_test_that_exists():
    links = re.findall(r"\[`(test_\w+)`\]\((\.\./tests/[\w/]+\.py)\)", LAWS.read_text())
    assert len(links) >= 13
    for name, path in links:
        assert f"def {name}(" in (LAWS.parent / path).read_text(), f"{path}::{name}"
