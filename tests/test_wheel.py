"""The wheel and the source archive: what they contain, and that an installed package works in an empty folder."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from lora_blip import doctor
from lora_blip.models import loading

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_in_the_wheel():
    """pyproject.toml lists every folder with an `__init__.py`, because the folder of the bases makes the list explicit."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lora_blip").rglob("__init__.py")}
    assert sorted(listed) == sorted({*folders, "lora_blip.assets"})


def test_an_embedded_base_is_found_in_every_folder(tmp_path, monkeypatch):
    """A folder of the working folder comes first, then the installed package, then the repository."""
    monkeypatch.chdir(tmp_path)
    assert loading.locate_model("assets/tiny-blip") == str(ROOT / "assets" / "tiny-blip")
    packaged = tmp_path / "site-packages" / "lora_blip"
    monkeypatch.setattr(loading, "PACKAGE", packaged)
    (packaged / "assets" / "tiny-blip").mkdir(parents=True)
    (packaged / "assets" / "tiny-blip" / "config.json").touch()
    assert loading.locate_model("assets/tiny-blip") == str(packaged / "assets" / "tiny-blip")
    (tmp_path / "assets" / "tiny-blip").mkdir(parents=True)
    assert loading.locate_model("assets/tiny-blip") == "assets/tiny-blip"
    with pytest.raises(loading.ModelError, match="does not exist"):
        loading.locate_model("assets/tiny-blop")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    """Each message of the package has the same command, with quotes that every shell accepts, and an extra that exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set()
    for path in (ROOT / "lora_blip").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "lora_blip[" in line and "{extra}" not in line:
                command = re.search(r'pip install "lora_blip\[(\w+)\]"', line)
                assert command, f"{path}: {line}"
                named.add(command[1])
    assert named == {"plots", "metrics", "tensorboard"} <= extras.keys()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(doctor, "BASES", ())
    assert not doctor.examine()
    lines = capsys.readouterr().out.splitlines()
    for extra in ("plots", "metrics", "tensorboard"):
        assert sum(line.endswith(f'missing: pip install "lora_blip[{extra}]"') for line in lines) == 1
