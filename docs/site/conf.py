"""The settings of Sphinx. `make docs` builds the site with `docs/site/build.py`, which prepares the source folder."""

import re
from html import escape
from typing import Any

from latex2mathml.converter import convert

import lora_blip

project, author, release = "lora_blip", "the authors of lora_blip", lora_blip.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", f"lora_blip {release}"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_math_renderer = "mathml"  # needs no JavaScript and no network
html_show_copyright = False
default_role = "code"  # the docstrings mark code with single backticks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the anchors of GitHub
nb_execution_mode = "off"  # build.py has executed the lessons
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_class_signature = "separated"
python_maximum_signature_line_length = 80
suppress_warnings = ["myst.xref_missing_source"]


def docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring of this project to reStructuredText: indented blocks are literal, and * and | mean themselves."""
    result: list[str] = []
    for line in lines:
        if re.match(r"[a-z_]+(, [a-z_]+)*: \S", line) and result and result[-1].strip():
            result.append("")  # the description of a parameter is a paragraph
        is_block = line.startswith("    ") and line.strip() and not (result and result[-1].strip())
        if is_block and not any(earlier.startswith("    ") for earlier in result[-2:-1]):
            result += ["::", ""]
        code = line.startswith(("    ", ">>>", "...")) or ("`" in line and "``" in line)
        result.append(line if code else re.sub(r"(`[^`]*`)|([*|_])", lambda m: m[1] or f"\\{m[2]}", line))
    lines[:] = result


def inline_math(translator: Any, node: Any) -> None:
    from docutils import nodes

    translator.body.append(f'<span class="math">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def block_math(translator: Any, node: Any) -> None:
    from docutils import nodes

    translator.body.append(f'<div class="math" role="math" tabindex="0" title="{escape(node.astext())}">')
    translator.body.append(convert(node.astext(), display="block") + "</div>")
    raise nodes.SkipNode


def without_dead_links(_app: Any, name: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Remove the links of the source pages to anchors and pages that do not exist.

    The list of modules has no anchors, because a name would then have two. The methods that Python adds to a NamedTuple have
    no source page.
    """
    if name.startswith("_modules/"):
        context["body"] = re.sub(r'<a class="viewcode-back"[^>]*>.*?</a>', "", context["body"])
        context["body"] = re.sub(r'<li><a href="namedtuple_\w+\.html">.*?</li>', "", context["body"])


def setup(app: Any) -> None:
    app.connect("html-page-context", without_dead_links)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-docstring", docstring)
