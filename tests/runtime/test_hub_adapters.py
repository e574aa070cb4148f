"""A name on the hub is an adapter everywhere; a download that fails is one message and leaves no partial file."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants

import lora_blip
from lora_blip.errors import AdapterError, ModelError
from lora_blip.models import hub
from lora_blip.runtime import hub_adapters, runs
from tests.support.api import ROOT, save_adapter
from tests.support.hub import Hub, serving

NAME, TOKEN = "user/cubes", "hf_thisTokenIsSecret"
IMAGE = str(ROOT / "image_test" / "000.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an adapter, as a run has it."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    save_adapter(folder / "adapter.safetensors")
    (folder / "README.md").write_text("a card")
    (folder / "code.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def web(run, tmp_path, monkeypatch):
    """Return a hub that serves the adapter. The working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ExitStack() as stack:
        server = Hub(NAME, shutil.copytree(run, tmp_path.parent / f"{tmp_path.name}_served"))
        address = stack.enter_context(serving(server))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def refused(match: str, capfd: pytest.CaptureFixture[str], name: str = NAME) -> None:
    """Check that a name is refused by one message, that nothing else is printed, and that no partial file remains."""
    capfd.readouterr()
    with pytest.raises(AdapterError, match=match) as caught:
        runs.locate(name)
    assert "\n" not in str(caught.value)
    shown = None if caught.value.__suppress_context__ else caught.value.__context__
    assert shown is None  # a traceback contains this message alone
    printed = "".join(capfd.readouterr())
    assert TOKEN not in printed + str(caught.value)
    assert all(line.startswith("downloading the adapter") for line in printed.splitlines())
    cache = Path(constants.HF_HUB_CACHE)
    assert not [path for path in cache.rglob("*") if "incomplete" in path.name or path.suffix == ".safetensors"]


@pytest.mark.parametrize("revision", ["", "@main", f"@{'a' * 40}"])
def test_a_name_is_its_adapter_and_only_the_adapter_is_downloaded(web, run, revision):
    captioner = lora_blip.Captioner.from_adapter(NAME + revision, device="cpu")
    assert captioner(IMAGE).text == lora_blip.Captioner.from_adapter(run, device="cpu")(IMAGE).text
    files = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_symlink()}
    assert files == {"adapter.safetensors"}
    before = len(web.requests)
    assert runs.locate(NAME + revision) == captioner.adapter.path and len(web.requests) == before, "asked once per process"


@pytest.mark.usefixtures("web")
def test_every_place_that_takes_an_adapter_takes_a_name(run):
    """`locate` is the only function that finds an adapter, so one test for each of its callers is enough."""
    backbone = lora_blip.load_backbone("assets/tiny-blip", "cpu")
    assert (
        lora_blip.load_adapter(backbone, NAME).metadata
        == lora_blip.load_adapter(lora_blip.load_backbone("assets/tiny-blip", "cpu"), run).metadata
    )
    assert runs.locate_initial(NAME) == runs.locate(NAME)


def test_a_folder_of_peft_is_downloaded_with_its_settings(web):
    folder = web.commits["main"][1]
    (folder / "adapter.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    path = runs.locate(NAME)
    assert path.name == "adapter_model.safetensors" and runs.is_peft(path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only adapter_model\.bin, which can run code"):
        runs.locate(f"{NAME}@main")


def test_a_local_path_wins(web, tmp_path):
    local = save_adapter(tmp_path / NAME / "adapter.safetensors", seed=1)
    assert runs.locate(NAME).resolve() == local.resolve() and not web.requests
    with pytest.raises(AdapterError, match="did you mean 'user/cubes'"):
        runs.locate("user/cubess")
    assert not web.requests, "a typing error in a local path is not looked up"


def test_without_a_network_the_cache_is_used_with_one_line(web, monkeypatch, capfd):
    path = runs.locate(NAME)
    for status, endpoint, offline in ((503, "", False), (0, "http://127.0.0.1:9", False), (0, "", True)):
        hub_adapters._fetched.clear()
        web.status = status
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        if endpoint:
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        capfd.readouterr()
        assert runs.locate(NAME) == path
        assert capfd.readouterr().err.count("\n") == (0 if offline else 1)


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_and_cache_there_is_one_message(web, monkeypatch, capfd, offline):
    web.status = 503
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    download = r"hf download user/cubes --local-dir adapter\. Then copy"
    refused(rf"no adapter at 'user/cubes' in .*, and as a name on the hub: {reason}.*{download}", capfd)
    with pytest.raises(AdapterError, match=r"hf download user/cubes --revision v2 --local-dir adapter\."):
        hub_adapters.fetch("user/cubes@v2")


def test_a_wrong_token_is_one_message_and_is_not_printed(web, capfd):
    web.token = "hf_another"
    refused("the hub refuses your token; log in again: hf auth login", capfd)
    with pytest.raises(ModelError, match="the hub refuses your token") as caught:
        hub.fetch(NAME)
    assert TOKEN not in str(caught.value)


def test_a_missing_name_revision_or_file_is_one_message(web, capfd):
    refused("no model of this name on the hub that you can read", capfd, "user/other")
    refused("it has no revision 'gone' on the hub", capfd, f"{NAME}@gone")
    (web.commits["main"][1] / "adapter.safetensors").unlink()
    refused(r"has no adapter\.safetensors, and no adapter_config\.json", capfd)


def test_a_connection_that_is_cut_in_the_file_is_one_message(web, monkeypatch, capfd):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # as of a large file: data arrives before the cut
    web.cut = "adapter.safetensors"
    refused("the connection was closed in the middle of the file", capfd)
    assert sum(request.endswith("adapter.safetensors") for request in web.requests) <= 4, "no endless attempts"


@pytest.mark.slow
@pytest.mark.usefixtures("web")
def test_the_command_downloads_and_captions(tmp_path):
    """In a new process, with HF_ENDPOINT."""
    environment = os.environ | {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.run(
        [sys.executable, "-m", "lora_blip", "caption", IMAGE, "--adapter", NAME, "--device", "cpu"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"{IMAGE}: ") and len(process.stdout.splitlines()) == 1
