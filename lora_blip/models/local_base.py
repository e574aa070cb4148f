"""Find the folder of a base on this machine. torch is not imported for it."""

from pathlib import Path

from lora_blip.errors import MissingBaseError
from lora_blip.models.unsupported import refuse_adapter, refuse_file
from lora_blip.runtime.untrusted import is_too_long, quoted
from lora_blip.runtime.user_paths import suggestion

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent


def locate_base(name: str) -> str:
    """Return the folder of a base on this machine, or "" for a hub name. Raise ModelError if a path does not exist.

    A relative folder may also be in the installed package or in the repository. So "assets/tiny-blip" is an embedded base in
    every working folder, unless the folder has its own assets/tiny-blip. Its bare name, "tiny-blip", is enough.
    """
    if is_too_long(name):
        raise MissingBaseError(f"model {quoted(name)} does not exist: the name is too long for a path")
    refuse_adapter(name)
    if Path(name).is_dir():
        return name
    for folder in (each for root in (PACKAGE, REPOSITORY) for each in (root / name, root / "assets" / name)):
        if (folder / "config.json").is_file():
            return str(folder)
    refuse_file(Path(name))
    is_path = name.startswith(("/", ".", "~", "assets/")) or "\\" in name
    has_folders = name.partition("@")[0].count("/") > 1  # a revision may contain a slash, as refs/pr/1 does
    if is_path or has_folders:
        near = near_embedded(name)
        problem = "does not exist" if is_path else "does not exist, and it is not a hub name"
        raise MissingBaseError(f"model folder {name!r} {problem}; {near}give the folder of a checkpoint, or a hub name")
    return ""


def near_embedded(name: str) -> str:
    """Return a suggestion of the embedded base whose name is similar to a wrong name, or ""."""
    folders = [path.parent.name for root in (PACKAGE, REPOSITORY) for path in root.glob("assets/*/config.json")]
    return suggestion(name, folders if "/" not in name else [f"assets/{each}" for each in folders], folders=True)
