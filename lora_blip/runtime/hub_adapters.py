"""Adapters on the Hugging Face hub, by `user/name` or `user/name@revision`.

A repository contains an adapter file of lora_blip, or a folder of peft. Only its .safetensors file and adapter_config.json are
downloaded, into the hub's cache. If the hub cannot be reached, the cached files are used.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_blip.errors import AdapterError
from lora_blip.runtime.adapter_names import ADAPTER_NAME, BEST_NAME, PEFT_CONFIG, PEFT_WEIGHTS
from lora_blip.runtime.untrusted import printable, quoted

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@\w[\w./-]*)?")
LARGEST = 8 * 2**30  # bytes; an adapter of r = 64 on all of BLIP-2 has less than one GB
_fetched: dict[tuple[str, str, str], Path] = {}  # (name, hub, cache) → file; so that one command asks the hub once


def is_name(adapter: str) -> bool:
    """Return True for a name on the hub. A path whose first folder exists is a local path with a typing error."""
    first = adapter.partition("/")[0]
    return bool(NAME.fullmatch(adapter)) and not adapter.endswith(".safetensors") and not Path(first).exists()


def fetch(name: str) -> Path:
    """Return the adapter file of a hub name. Download it, with adapter_config.json, if it is not in the cache.

    Raise AdapterError if there is no such repository, revision or adapter, or if the hub cannot be reached and the cache has no
    copy. A download that fails leaves no partial file.
    """
    from huggingface_hub import constants

    key = (name, constants.ENDPOINT, str(constants.HF_HUB_CACHE))
    if key not in _fetched or not _fetched[key].exists():
        repository, _, revision = name.partition("@")
        if constants.HF_HUB_OFFLINE:
            _fetched[key] = _cached(name, repository, revision, "HF_HUB_OFFLINE is set")
        else:
            _fetched[key] = _downloaded(name, repository, revision)
    return _fetched[key]


def _downloaded(name: str, repository: str, revision: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    address = f"{constants.ENDPOINT}/{repository}"
    try:
        return _download(name, repository, revision or "main")
    except (RevisionNotFoundError, GatedRepoError, RepositoryNotFoundError, HFValidationError) as error:
        problem = "there is no adapter at this path, and no model of this name on the hub that you can read; correct the name"
        if isinstance(error, RevisionNotFoundError):
            problem = f"it has no revision {revision!r} on the hub; give one that {address}/commits lists"
        elif isinstance(error, GatedRepoError):
            problem = f"the hub gives it only to users who accepted its terms; accept them on {address}, then: hf auth login"
        elif refuses_token(error):
            problem = TOKEN
        raise AdapterError(f"adapter {quoted(name)}: {problem}") from None
    except HfHubHTTPError as error:
        if refuses_token(error):
            raise AdapterError(f"adapter {quoted(name)}: {TOKEN}") from None
        return _cached(name, repository, revision, f"the hub cannot be reached ({_reason(error)})")
    except (httpx.HTTPError, OSError) as error:
        return _cached(name, repository, revision, f"the hub cannot be reached ({_reason(error)})")


TOKEN = "the hub refuses your token; log in again: hf auth login (or correct the environment variable HF_TOKEN)"


def refuses_token(error: Any) -> bool:
    """Return True if the hub's answer is that the user's token is not valid."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", {})
    return getattr(response, "status_code", 0) == 401 and "Invalid credentials" in headers.get("X-Error-Message", "")


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the user's token."""
    from huggingface_hub import get_token

    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return printable(line.replace(get_token() or "\0", "…"))


def _download(name: str, repository: str, revision: str) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    from lora_blip.runtime.hub_cache import SECONDS, remember

    info = HfApi().model_info(repository, revision=revision, timeout=SECONDS, files_metadata=True)
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    files = chosen(sizes, name)
    if max(sizes[file] for file in files) > LARGEST:
        raise AdapterError(f"adapter {quoted(name)}: its file on the hub has more than {LARGEST // 2**30} GB; give another one")
    size = sum(sizes[file] for file in files)
    print(f"downloading the adapter {name}" + f", {size / 2**20:,.1f} MB" * bool(size), file=sys.stderr, flush=True)
    with one_message():
        paths = [
            hf_hub_download(
                repository, file, revision=str(info.sha), endpoint=constants.ENDPOINT, etag_timeout=SECONDS,
                tqdm_class=bar_of_one_attempt(),
            )
            for file in files
        ]  # fmt: skip
    remember(repository, revision, str(info.sha))
    return Path(paths[-1])


class RestartedError(OSError):
    """A download was cut, and the hub would send the file from its start again."""


@contextmanager
def one_message() -> Iterator[None]:
    """Suppress the line that huggingface_hub prints for each attempt of a download. The error at the end has the reason."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def bar_of_one_attempt() -> Any:
    """Return a class of progress bars that ends a download that begins again. huggingface_hub would try without a limit."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> Any:
            if n is not None and n < 0:
                raise RestartedError("the connection was closed in the middle of the file")
            return super().update(n)

    return Bar


def chosen(names: Iterable[str], name: str) -> list[str]:
    """Return the files of an adapter among those of a repository, its weights last. Raise AdapterError if there are none."""
    names = set(names)
    for own in (BEST_NAME, ADAPTER_NAME):
        if own in names:
            return [own]
    if {PEFT_CONFIG, PEFT_WEIGHTS} <= names:
        return [PEFT_CONFIG, PEFT_WEIGHTS]
    files = [each for each in names if each.endswith(".safetensors") and "/" not in each and not each.startswith("model")]
    if len(files) == 1 and PEFT_CONFIG not in names:
        return files
    if "adapter_model.bin" in names:
        raise AdapterError(
            f"adapter {quoted(name)}: its repository has only adapter_model.bin, which can run code when it is read; load it "
            "in peft, and save it again with save_pretrained"
        )
    raise AdapterError(
        f"adapter {quoted(name)}: its repository has no {ADAPTER_NAME}, and no {PEFT_CONFIG} with {PEFT_WEIGHTS}; give the "
        "name of an adapter (a base is given as MODEL, --model)"
    )


def _cached(name: str, repository: str, revision: str, reason: str) -> Path:
    """Return the adapter file of the newest complete copy in the cache, and print a line. Raise AdapterError without a copy."""
    from huggingface_hub import constants

    from lora_blip.runtime.hub_cache import download_command, root_of, snapshots

    for folder in snapshots(root_of(repository), revision):
        try:
            path = folder / chosen([each.name for each in folder.iterdir() if each.exists()], name)[-1]
        except (AdapterError, OSError):
            continue
        if not constants.HF_HUB_OFFLINE:
            print(f"{reason}; using the copy of {name!r} in the cache, {folder}", file=sys.stderr, flush=True)
        return path
    raise AdapterError(
        f"no adapter at {name!r} in {str(Path.cwd())!r}, and as a name on the hub: {reason}, and the cache has no copy of it "
        f"({root_of(repository)}); give the path of an adapter, or download it on a machine with a network: "
        f"{download_command(repository, revision, 'adapter')}. Then copy the folder here, and give its path: --adapter adapter "
        '(in Python: "adapter")'
    ) from None
