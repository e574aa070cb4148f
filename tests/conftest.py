"""Fixtures: tiny checkpoints made once a session, fresh backbones for each test. Everything is offline."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lora_blip_tests_")  # the record of verified fast paths
os.environ["MPLCONFIGDIR"] = os.environ.get("MPLCONFIGDIR") or os.path.expanduser("~/.cache/matplotlib")  # noqa: PTH111
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"  # noqa: PTH120 — as in a venv
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's SVD; many threads are slow beside other workers

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip.kernels import paths
from lora_blip.models import loading
from lora_blip.models.loading import Backbone, load_backbone
from lora_blip.reports import plots
from lora_blip.tasks import verification_record
from tests.support import tiny
from tests.support.browser import FLAGS
from tests.support.models import KINDS, WHOLE

CACHE = Path(os.environ["XDG_CACHE_HOME"])
# each machine takes the same paths, and small models use the fused update
PATHS = paths.PathLimits(paths.processor(), 2**20, 2**20, 0, 2**20, paths.NEVER, 2**22)
paths.tuned_file().parent.mkdir()
paths.tuned_file().write_bytes(paths.table(PATHS))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(paths.Current, "row", PATHS)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test needs it, and it takes minutes on a slow disk


@pytest.fixture(autouse=True)
def _checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the fast path as verified, except in the tests of the verification."""
    if request.module.__name__ != "tests.tasks.test_verification":
        monkeypatch.setattr(verification_record, "is_verified", lambda _: True)


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no loss curve, because it takes longer than most trainings here. Tests of curves have the marker `plots`."""
    if not request.node.get_closest_marker("plots"):
        monkeypatch.setattr(plots, "draw", lambda _: None)


@pytest.fixture(autouse=True)
def _loaded_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return a copy if the same weights were loaded with the same config before, which takes a fifth of the time.

    Tests with the marker `loads` always read the file.
    """
    if not request.node.get_closest_marker("loads"):
        monkeypatch.setattr(loading, "_load_model", load_once)


REAL_LOAD, LOADED = loading._load_model, {}


def load_once(kind: Any, source: str, name: str, config: Any, dtype: torch.dtype, width: str, where: torch.device) -> Any:
    if width:  # a quantized model is small, and `_load_model` prints how it is quantized
        return REAL_LOAD(kind, source, name, config, dtype, width, where)
    files = tuple(sorted((path.name, *path.stat()[6:9]) for path in Path(source).glob("*")))
    key = kind, source, files, config.to_json_string(), dtype
    if key not in LOADED:
        if len(LOADED) >= 16:
            LOADED.clear()
        with torch.random.fork_rng(devices=[]):  # a copy draws no random numbers
            LOADED[key] = REAL_LOAD(kind, source, name, config, dtype, width, where)
    return deepcopy(
        LOADED[key]
    )  # the first time too: the memory of a file is aligned otherwise, and sums differ in the last bit


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.save_blip(root / "blip")
    for language in ("opt", "t5"):
        tiny.save_blip2(root / language, language)
    tiny.save_vqa(root / "vqa")
    tiny.save_itm(root / "itm")
    tiny.save_itm2(root / "itm2")
    return {kind: root / kind for kind in WHOLE}


@pytest.fixture(scope="session")
def original(checkpoints: dict[str, Path]) -> Callable[[str], Backbone]:
    """Return a function that loads each kind once. Tests copy the result: a copy takes a fifth of the time."""
    return cache(lambda kind: load_backbone(str(checkpoints[kind]), "cpu"))


@pytest.fixture
def make(checkpoints: dict[str, Path], original: Callable[[str], Backbone]) -> Callable[..., Backbone]:
    """Return a function: make("blip", dtype="fp16") returns a new frozen backbone on the CPU."""

    def fresh(kind: str, **options: Any) -> Backbone:
        if options:
            return load_backbone(str(checkpoints[kind]), "cpu", **options)
        return replace(original(kind), model=deepcopy(original(kind).model))

    return fresh


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest, make: Callable[..., Backbone]) -> Backbone:
    return make(request.param)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except webdriver.remote.webdriver.WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {error.msg}")
    yield browser
    browser.quit()
