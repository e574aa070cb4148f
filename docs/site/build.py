"""Build the site: `make docs`, or `python docs/site/build.py`. The result is docs/_build/html/index.html.

1. Execute the lessons, two at a time. A lesson is executed again only if it, lesson_tools.py or lora_blip changed.
2. Write docs/_build/notebooks/*.ipynb: the lessons with their outputs. Their first cell installs lora_blip on Google Colab.
3. Copy the pages into docs/_build/source, list the API there, and run Sphinx, which treats a warning as an error.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lora_blip, also if it is not installed
os.environ.setdefault("PYTHONPATH", str(ROOT))
TOGETHER = 2  # lessons that are executed at the same time; more threads than cores can make PyTorch 40 times slower
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or TOGETHER) // TOGETHER)))
BUILD = ROOT / "docs" / "_build"
SOURCE, NOTEBOOKS, EXECUTED = BUILD / "source", BUILD / "notebooks", BUILD / "executed"
REPOSITORY = os.environ.get("REPOSITORY") or "https://github.com/OWNER/lora_blip"  # make docs REPOSITORY=https://…
COLAB = f"""# On Google Colab, this cell installs lora_blip. Elsewhere, it does nothing.
REPOSITORY = "{REPOSITORY}"
import sys
if "google.colab" in sys.modules:
    !git clone --quiet --depth 1 $REPOSITORY /content/lora_blip
    %pip install --quiet -e "/content/lora_blip[plots]"
    %cd /content/lora_blip/lessons"""
LISTED = [ROOT / name for name in ("README.md", "lessons/README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
KERNEL = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
USE = (
    "data",
    "prepare",
    "tasks",
    "models",
    "generation",
    "evaluation",
    "inspect",
    "explain",
    "resume",
    "blend",
    "python_api",
    "large_inference",
    "many_devices",
    "performance",
    "fast_paths",
)
MODULES = (  # in the order in which a reader opens them
    "lora.layer", "lora.injection", "lora.targets", "lora.merging", "lora.routing", "lora.fused", "lora.spectrum",
    "lora.adapter_file", "models.loading", "tasks.base", "tasks.caption", "tasks.vqa", "tasks.retrieval", "training.loop",
    "training.learner", "inference.captioner", "inference.pipeline", "evaluation.comparison", "errors",
)  # fmt: skip


def execute(path: Path, fingerprint: str) -> Any:
    """Return a lesson as an executed notebook, from docs/_build/executed if nothing has changed."""
    key = hashlib.sha256(fingerprint.encode() + path.read_bytes()).hexdigest()[:16]
    stored = EXECUTED / f"{path.stem}-{key}.ipynb"
    if not stored.exists():
        print(f"executing {path.name} …", flush=True)
        started = time.perf_counter()
        notebook = jupytext.read(path)
        notebook.metadata.update(KERNEL)
        quiet = ["--log-level=40"]  # errors alone: each kernel warns that its TCP connections are not encrypted
        folder = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=900, startup_timeout=300, extra_arguments=quiet, resources=folder)
        client.execute()
        for old in EXECUTED.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        EXECUTED.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, stored)
        print(f"executed {path.name} in {time.perf_counter() - started:.0f} s", flush=True)
    return nbformat.read(stored, as_version=4)


def write_lessons() -> list[str]:
    """Write the lessons for Colab and for the site, and the solutions as pages. Return the names of the pages."""
    files = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
    used = [ROOT / "lessons" / "lesson_tools.py", *sorted((ROOT / "lora_blip").rglob("*.py"))]
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()
    print("executing the lessons that have changed: all of them take about three minutes on two idle cores", flush=True)
    with ThreadPoolExecutor(TOGETHER) as pool:
        executed = list(pool.map(lambda path: execute(path, fingerprint), files))
    shutil.rmtree(NOTEBOOKS, ignore_errors=True)
    NOTEBOOKS.mkdir(parents=True)
    pages = []
    for path, notebook in zip(files, executed, strict=True):
        solution = ROOT / "lessons" / "solutions" / path.name
        link = nbformat.v4.new_markdown_cell(f"[Solutions of the exercises](solutions/{path.stem}.ipynb)")
        site = nbformat.v4.new_notebook(cells=[*notebook.cells, link], metadata=notebook.metadata)
        nbformat.write(site, page(f"lessons/{path.name}").with_suffix(".ipynb"))
        answers = nbformat.v4.new_notebook(cells=jupytext.read(solution).cells, metadata={**KERNEL, "orphan": True})
        nbformat.write(answers, page(f"lessons/solutions/{path.name}").with_suffix(".ipynb"))
        colab = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(COLAB), *notebook.cells], metadata=notebook.metadata)
        nbformat.write(colab, NOTEBOOKS / f"{path.stem}.ipynb")
        pages += [f"lessons/{path.stem}.ipynb"]
    return pages


def page(name: str) -> Path:
    """Return the path of a page in the source folder of Sphinx, whose folder exists."""
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_api() -> None:
    """Write the pages of the API: the names of `lora_blip`, the settings, and the main modules."""
    import lora_blip
    from lora_blip.runtime.settings import settings_of

    settings = ("TrainConfig", "InferConfig", "EvaluateConfig")
    lines = ["# The public interface", "", "Each name is imported from `lora_blip`, for example `lora_blip.Captioner`.", ""]
    for name in (name for name in lora_blip.EXPORTS if name not in settings):
        kind = "class" if isinstance(getattr(lora_blip, name), type) else "function"
        kind = "exception" if name.endswith("Error") else kind
        members = ["   :members:", "   :special-members: __call__"] if kind == "class" else []
        lines += [f"## {name}", "", "```{eval-rst}", f".. auto{kind}:: lora_blip.{name}", *members, "```", ""]
    page("api/public.md").write_text("\n".join(lines), encoding="utf-8")

    lines = [
        "# The settings",
        "",
        "In `train.py` and `infer.py` they are in capitals, and flags have hyphens: `--batch-size 16`.",
        "",
    ]
    for name in settings:
        lines += [f"## {name}", "", "| setting | default | meaning |", "|---|---|---|"]
        for field in settings_of(getattr(lora_blip, name)):
            default = "" if field.default is MISSING else f"`{field.default!r}`"
            lines += [f"| `{field.name}` | {default} | {text(field.metadata['doc'])} |"]
        lines += [""]
    page("api/settings.md").write_text("\n".join(lines), encoding="utf-8")

    lines = ["# The main modules", "", "In the order in which to read them. [The code map](../docs/code_map.md) lists all.", ""]
    for module in MODULES:
        lines += [f"## lora_blip.{module}", "", "```{eval-rst}", f".. automodule:: lora_blip.{module}", "   :members:"]
        lines += ["   :no-index:", "```", ""]
    page("api/modules.md").write_text("\n".join(lines), encoding="utf-8")


def text(doc: str) -> str:
    """Return the help text of a setting as a cell of a table: its quoted values as code, nothing as a link or emphasis."""
    parts = doc.replace("|", "\\|").replace("\\\\", "\\").split('"')
    return "".join(f'`"{part}"`' if odd % 2 else part.replace("{", "\\{").replace("*", "\\*") for odd, part in enumerate(parts))


def copy_page(path: Path, listed: bool = False) -> None:
    """Copy a page, and what it links to: other pages as pages, other files as downloads. A link to a folder becomes text.

    listed: whether the page is in the navigation. Other pages can be reached only by links.
    """
    target = page(str(path.relative_to(ROOT)))
    if target.exists():
        return
    content = path.read_text(encoding="utf-8").replace("```mermaid", "```text")
    content = re.sub(r"(lessons/\d\d_\w+)\.py\)", r"\1.ipynb)", content)  # a lesson is a page
    if not listed:
        content = f"---\norphan: true\n{content[4:]}" if content.startswith("---\n") else f"---\norphan: true\n---\n{content}"
    target.touch()  # two pages may link to each other
    for whole, label, link in re.findall(r"(\[([^][]*)\]\(([^)#:]+)[^):]*\))", content):
        other = (path.parent / link).resolve()
        if other.is_dir():
            content = content.replace(whole, label)
        elif other.suffix == ".md":
            copy_page(other, other.parent == ROOT / "docs" or other in LISTED)
        elif other.suffix != ".ipynb" and not page(str(other.relative_to(ROOT))).exists():
            shutil.copy(other, page(str(other.relative_to(ROOT))))
    target.write_text(content, encoding="utf-8")


def write_pages(lessons: list[str]) -> None:
    """Write all pages that are not lessons or parts of the API, and the settings of Sphinx."""
    docs = sorted((ROOT / "docs").glob("*.md"))
    for path in (*LISTED, *docs):
        copy_page(path, listed=True)
    others = [*USE, *sorted({path.stem for path in docs} - {"learn", *USE})]
    site = ROOT / "docs" / "site"
    start = (site / "index.md").read_text(encoding="utf-8")
    start = start.replace("{lessons}", "\n".join(lessons)).replace("{pages}", "\n".join(f"docs/{name}.md" for name in others))
    page("index.md").write_text(start, encoding="utf-8")
    shutil.copy(site / "site.css", page("_static/site.css"))
    shutil.copy(site / "conf.py", page("conf.py"))


class Links(HTMLParser):
    """The anchors of a page, and the addresses to which it links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.addresses = set[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002  (as in HTMLParser)
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.addresses.append(value)


def dead_links(folder: Path) -> list[str]:
    """Return the links of the pages in a folder whose file or anchor does not exist. Links to other sites are not checked."""
    pages = {path.resolve(): Links(path) for path in folder.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (parts.fragment and target in pages and unquote(parts.fragment) not in anchors):
                dead.append(f"{path.relative_to(folder.resolve())}: {address}")
    return dead


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    lessons = write_lessons()
    write_pages(lessons)
    write_api()
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(SOURCE), str(BUILD / "html")]
    if subprocess.run(command, check=False).returncode:
        sys.exit("The site has the problems that are listed above. Fix them in the pages, lessons or docstrings.")
    if dead := dead_links(BUILD / "html"):
        sys.exit("\n".join([*dead, f"The site has {len(dead)} links without a target. Fix them in the pages or docstrings."]))
    print(f"site: {(BUILD / 'html' / 'index.html').as_uri()}\nnotebooks for Colab: {NOTEBOOKS}")
    if "/OWNER/" in REPOSITORY:
        print("the notebooks have no address of a repository; for Colab: make docs REPOSITORY=https://…")


if __name__ == "__main__":
    main()
