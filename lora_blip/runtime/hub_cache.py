"""The cache of the Hugging Face hub on this machine: which folder has the files of a repository and a revision."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from lora_blip.runtime.files import write_whole
from lora_blip.runtime.system_errors import quoted_for_shell

# folder in the hub cache's `refs`, with a file for each revision: the downloaded commit, of the revision or of its conversion
OURS = "lora_blip"
SECONDS = 10  # the hub must answer within this time, or the cache is used


def root_of(repository: str) -> Path:
    """Return the folder of a repository in the cache."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def remember(repository: str, revision: str, commit: str) -> None:
    """Write which commit a revision was when it was downloaded, so that the same revision is found without a network."""
    if ".." in Path(revision).parts or Path(revision).is_absolute():
        return  # git allows no such name
    with suppress(OSError):  # the cache may be read-only
        write_whole(root_of(repository) / "refs" / OURS / revision, commit.encode())


def download_command(repository: str, revision: str, folder: str) -> str:
    """Return the command that downloads a repository into a folder, on a machine with a network."""
    chosen = f" --revision {quoted_for_shell(revision)}" * bool(revision)
    return f"hf download {quoted_for_shell(repository)}{chosen} --local-dir {folder}"


def snapshots(root: Path, revision: str) -> Iterator[Path]:
    """Yield the folders of a cached repository: that of the revision, then those of other references, the newest first.

    Without a revision, main comes first. A file in `refs` names the commit of a revision. `remember` and the hub's own
    programs write these files.
    """
    yield from (folder for folder in [root / "snapshots" / revision] if revision and folder.is_dir())
    references = sorted((path for path in (root / "refs").rglob("*") if path.is_file()), key=_modified, reverse=True)
    own = [folder / (revision or "main") for folder in (root / "refs", root / "refs" / OURS)]
    for path in sorted(references, key=lambda path: path not in own):
        if not revision or path in own:
            yield root / "snapshots" / path.read_text(encoding="utf-8").strip()
    if not revision:  # a commit that was downloaded by its number has no reference
        yield from sorted((root / "snapshots").glob("*"), key=_modified, reverse=True)


def _modified(path: Path) -> float:
    return path.stat().st_mtime
