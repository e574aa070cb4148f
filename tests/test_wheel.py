"""The wheel and the source archive: what they contain, and that an installed package works in an empty folder."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from lora_blip import doctor
from lora_blip.models import loading, local_base
from lora_blip.version import __version__
from tests.support import tiny

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
    monkeypatch.setattr(local_base, "PACKAGE", packaged)
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
    every = {"plots", "metrics", "tensorboard", "excel", "parquet", "heic", "quantized"}
    assert named == every <= extras.keys()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(doctor, "BASES", ())
    assert not doctor.examine()
    lines = capsys.readouterr().out.splitlines()
    for extra in every:
        assert sum(line.endswith(f'missing: pip install "lora_blip[{extra}]"') for line in lines) == 1


# ---------------------------------------------------------------- build and install


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the source archive from a copy of the repository, and the wheel from that archive. Return both."""
    folder = tmp_path_factory.mktemp("archives")
    left_out = shutil.ignore_patterns(".*", "image_test", "image_train", "lora_blip_output", "shared", "build", "*.egg-info")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    (folder / "copy" / "lora_blip" / "__pycache__").mkdir(exist_ok=True)
    (folder / "copy" / "lora_blip" / "__pycache__" / "cli.pyc").touch()
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, "build_sdist", folder], cwd=folder / "copy", check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "source", filter="data")
    (unpacked,) = (folder / "source").iterdir()
    subprocess.run([sys.executable, "-c", build, "build_wheel", folder], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a new environment, which borrows the libraries of this one, and return its folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(archives[1])], check=True)
    (packages,) = folder.glob("[Ll]ib/**/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])  # its own .pth files are not read: no lora_blip
    return programs


def output(programs: Path, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a program of the new environment in a folder outside the repository."""
    unset = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | {"COLUMNS": "100"}
    program, *arguments = map(str, command)
    return subprocess.run(
        [str(programs / program), *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_the_archives_contain_what_users_need_and_nothing_else(archives):
    """The bases, py.typed, the page and the license are in both; tests, toyworld, benchmarks and caches are in none."""
    with tarfile.open(archives[0]) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(archives[1]) as archive:
        wheel = set(archive.namelist())
        metadata = archive.read(next(name for name in wheel if name.endswith("METADATA"))).decode()
    bases = {f"{path.parent.name}/{path.name}" for path in (ROOT / "assets").glob("tiny-*/*")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_blip").rglob("*.py")}
    assert len(bases) > 20 and {f"lora_blip/assets/{name}" for name in bases} <= wheel
    assert {f"assets/{name}" for name in bases} | {"LICENSE", "README.md", "pyproject.toml", "train.py", "infer.py"} <= source
    assert modules | {"lora_blip/py.typed", "lora_blip/reports/report.html"} <= wheel & source
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    folders = {"lora_blip", *(name.partition("/")[0] for name in wheel if ".dist-info/" in name)}
    assert {name.partition("/")[0] for name in wheel} == folders and len(folders) == 2
    assert not [name for name in wheel | source if "pycache" in name or name.endswith((".pyc", ".png"))]
    assert not [name for name in source if name.startswith(("tests", "toyworld", "benchmarks"))]
    assert "Provides-Extra: plots" in metadata and "LoRA fine-tuning" in metadata


@pytest.mark.slow
def test_the_program_is_installed(installed, tmp_path):
    """`lora-blip` and `python -m lora_blip` are the installed package, and its doctor finds every base in it."""
    code = "import lora_blip; print(lora_blip.__file__)"
    assert output(installed, tmp_path, "python", "-c", code).stdout.startswith(str(installed.parent))
    helped = output(installed, tmp_path, "lora-blip", "--help")
    assert helped.returncode == 0 and helped.stdout == output(installed, tmp_path, "python", "-m", "lora_blip").stdout
    assert "  doctor " in helped.stdout and helped.stderr == ""
    assert output(installed, tmp_path, "lora-blip", "--version").stdout == f"lora_blip {__version__}\n"
    examined = output(installed, tmp_path, "lora-blip", "doctor")
    assert examined.returncode == 0 and examined.stderr.startswith("doctor: loading torch"), examined.stderr
    assert all(f"\n{name}: works" in examined.stdout for name in doctor.BASES)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_and_its_captions_in_a_folder_of_the_user(installed, tmp_path):
    """Train on an annotations file elsewhere, with image paths relative to it; then caption by command and from Python."""
    data, work = tmp_path / "data", tmp_path / "work"
    annotations = tiny.write_photos(data, 8, ["a red circle", "a blue square"] * 4)
    work.mkdir()
    settings = "--max-steps 2 --batch-size 4 --no-augment --val-fraction 0.25 --num-workers 0 --device cpu".split()
    trained = output(installed, work, "lora-blip", "train", "--annotations", annotations, *settings)
    assert trained.returncode == 0, trained.stderr
    (adapter,) = work.glob("lora_blip_output/*/adapter.safetensors")
    assert [path.name for path in work.iterdir()] == ["lora_blip_output"]

    image = data / "photos" / "0.png"
    shutil.copy(image, work / "x.png")
    by_file = output(installed, work, "lora-blip", "caption", "x.png", "--adapter", adapter)
    assert by_file.returncode == 0 and by_file.stdout.startswith("x.png: a "), by_file.stderr
    assert output(installed, work, "lora-blip", "caption", "x.png").stdout == by_file.stdout  # "latest"
    code = (
        "import lora_blip\n"
        "from PIL import Image\n"
        "captioner = lora_blip.Captioner.from_adapter('latest')\n"
        "prediction = captioner(Image.open('x.png'))\n"
        "print(prediction.text)\n"
    )
    assert f"x.png: {output(installed, work, 'python', '-c', code).stdout}" == by_file.stdout
