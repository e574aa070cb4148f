"""A hub name loads as its folder does; without a network it loads from the cache, or is one error."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from lora_blip.errors import ModelError
from lora_blip.models import hub
from lora_blip.models.loading import load_backbone
from tests.support.hub import Hub, serving

NAME = "user/tiny"


@pytest.fixture
def served(tmp_path, checkpoints, monkeypatch):
    """Return a function that serves a checkpoint as a hub repository: serve(conversion=…, only_bin=…)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ExitStack() as stack:

        def serve(only_bin: bool = False, **options) -> Hub:
            folder = tmp_path / "served"
            shutil.copytree(checkpoints["blip"], folder)
            (folder / "README.md").write_text("a card")
            (folder / "modeling_blip.py").write_text("raise SystemExit")
            if only_bin:
                torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
                (folder / "model.safetensors").unlink()
            hub_server = Hub(NAME, folder, **options)
            address = stack.enter_context(serving(hub_server))
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            )
            return hub_server

        yield serve


def same(name: str, folder: Path) -> bool:
    states = [load_backbone(source, "cpu").model.state_dict() for source in (name, str(folder))]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_a_name_loads_as_its_folder_and_code_is_not_downloaded(served, checkpoints, tmp_path):
    served()
    assert same(NAME, checkpoints["blip"]) and same(f"{NAME}@main", checkpoints["blip"])
    names = {path.name for path in (tmp_path / "hub").rglob("*") if path.is_symlink()}
    assert "config.json" in names and not names & {"README.md", "modeling_blip.py"}
    assert load_backbone(NAME, "cpu").name == NAME


def test_without_a_network_the_cache_is_used_with_one_line(served, checkpoints, monkeypatch, capsys):
    web = served()
    load_backbone(NAME, "cpu")
    capsys.readouterr()
    web.status = 503
    assert same(NAME, checkpoints["blip"])
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refused
    assert same(NAME, checkpoints["blip"]) and "the hub cannot be reached" in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(NAME, checkpoints["blip"]) and same(f"{NAME}@{'a' * 40}", checkpoints["blip"])
    assert capsys.readouterr().out == "", "the user chose to be offline"


def test_without_a_network_each_revision_has_its_own_weights(served, monkeypatch, tmp_path):
    """Without a network, a name loads the cached commit of its revision, also if another revision was cached later."""
    web = served()
    shutil.copytree(tmp_path / "served", tmp_path / "older")
    web.commits["v1"] = ("c" * 40, tmp_path / "older")
    assert [hub.fetch(name)[-1] for name in (NAME, f"{NAME}@v1")] == ["a", "c"]
    for offline in (False, True):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert [hub.fetch(name)[-1] for name in (NAME, f"{NAME}@main", f"{NAME}@v1")] == ["a", "a", "c"]
        with pytest.raises(ModelError, match="no complete copy"):
            hub.fetch(f"{NAME}@v2")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_and_cache_there_is_one_error(monkeypatch, offline):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    with pytest.raises(ModelError, match=rf"{reason}.* cache has no complete copy .*hf download user/tiny") as caught:
        load_backbone(NAME, "cpu")
    with pytest.raises(ModelError, match=rf"hf download {NAME} --revision v2 --local-dir base\. Then copy"):
        load_backbone(f"{NAME}@v2", "cpu")  # without the revision, it would be main
    assert caught.value.__suppress_context__  # a traceback shows the message without those of the connection


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("name", "near"), [("tiny-blip9", "tiny-blip"), ("tinyblip-vqa", "tiny-blip-vqa")])
def test_a_misspelled_embedded_base_is_suggested(monkeypatch, name, near):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=f"^did you mean '{near}'. Otherwise the hub cannot be reached"):
        load_backbone(name, "cpu")


def test_an_incomplete_cache_is_no_checkpoint(served, monkeypatch, tmp_path):
    served()
    load_backbone(NAME, "cpu")
    next((tmp_path / "hub").rglob("snapshots/*/model.safetensors")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no complete copy"):
        load_backbone(NAME, "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/other", "no model of this name on the hub that you can read"),
        (f"{NAME}@gone", "has no revision 'gone'"),
        ("my model", "it is not a hub name"),
        ("a/b/c", "it is not a hub name"),
        ("user/\x1b[2J", "it is not a hub name"),
    ],
)
def test_a_wrong_name_is_one_error(served, name, message):
    served()
    with pytest.raises(ModelError, match=message) as caught:
        load_backbone(name, "cpu")
    assert str(caught.value).isprintable()


def test_a_connection_that_is_cut_in_the_weights_is_one_error(served, monkeypatch, tmp_path):
    """huggingface_hub alone would begin the file again without a limit, if data arrives before the cut."""
    web = served()
    web.cut = "model.safetensors"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    with pytest.raises(ModelError, match="the connection was closed in the middle of the file") as caught:
        load_backbone(NAME, "cpu")
    assert "\n" not in str(caught.value)
    assert sum(request.endswith("model.safetensors") for request in web.requests) <= 4
    assert not [path for path in (tmp_path / "hub").rglob("*") if "incomplete" in path.name]


@pytest.mark.loads
def test_a_repository_with_only_a_bin_is_converted(served, checkpoints, capsys):
    web = served(only_bin=True)
    assert same(NAME, checkpoints["blip"]) and "converting" in capsys.readouterr().out
    assert not any(request.startswith("POST") for request in web.requests), "no conversion is requested with the user's token"


@pytest.mark.loads
@pytest.mark.parametrize("author", ["SFconvertbot", "somebody"])
def test_the_hubs_own_conversion_is_used_and_nobody_elses(served, checkpoints, capsys, author):
    web = served(only_bin=True, conversion=checkpoints["blip"], author=author)
    assert same(NAME, checkpoints["blip"])
    assert ("converting" in capsys.readouterr().out) == (author == "somebody")
    assert any("pytorch_model.bin" in request for request in web.requests) == (author == "somebody")
    assert hub.fetch(NAME).endswith(("b" if author == "SFconvertbot" else "a") * 40)
