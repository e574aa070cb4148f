"""Check that each fast module has the signature of the method of transformers or PyTorch that it replaces.

A fast module replaces the `forward` of a library class. If a new version of the library renames an argument, `**kwargs`
swallows the new name and the result is wrong without an error. So each fast class lists in `WRITTEN_FOR` the
signatures that it implements, and is used only if the installed library has one of them. A call with an argument that
the fast class does not know runs the library's own method.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

EMPTY = inspect.Parameter.empty
REPORTED: set[str] = set()  # lines that this process has printed


def signature_of(method: Callable[..., Any]) -> str:
    """Return the parameters of a method without annotations, such as "(self, x, mask=None, **kwargs)"."""
    signature = inspect.signature(method)
    parameters = [parameter.replace(annotation=EMPTY) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=EMPTY))


def fits_library(fast: type[nn.Module], library: type[nn.Module]) -> bool:
    """Return True if `fast` was written for the `forward` of `library`. If not, print that once and return False."""
    installed = signature_of(library.forward)
    if installed in fast.WRITTEN_FOR:  # type: ignore[attr-defined]
        return True
    report(
        f"{version_of(library)}: the fast version of {library.__name__} is off, because it was not written for "
        f"forward{installed}; the library's own is used"
    )
    return False


def version_of(kind: type) -> str:
    """Return the library of a class and its version: "transformers 5.23.0"."""
    package = kind.__module__.split(".")[0]
    return f"{package} {importlib.metadata.version(package)}"


def report(line: str) -> None:
    """Print a line, once in this process."""
    if line not in REPORTED:
        REPORTED.add(line)
        print(line)
