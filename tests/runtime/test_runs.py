"""Which weights of a run are used."""

import os
from pathlib import Path

import pytest

from lora_blip.errors import AdapterError
from lora_blip.inference.adapter_choice import read_adapter
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, CHECKPOINTS_NAME, LARGEST_CONFIG, is_adapter, locate, locate_initial


def test_the_best_weights_of_the_newest_run_are_used_also_if_it_was_killed(tmp_path: Path) -> None:
    """A killed run has only its best weights. Those in the checkpoints are another copy."""
    for time, name in enumerate(("older", "newer"), 1):
        (tmp_path / name / "checkpoints" / "one").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "one" / BEST_NAME).touch()
        with pytest.raises(AdapterError, match="no adapter at"):
            locate(tmp_path / name)
        (tmp_path / name / BEST_NAME).touch()
        assert locate(tmp_path / name) == tmp_path / name / BEST_NAME
        (tmp_path / name / ADAPTER_NAME).touch()
        os.utime(tmp_path / name / ADAPTER_NAME, (time, time))
    assert locate("latest", tmp_path) == tmp_path / "newer" / BEST_NAME
    (tmp_path / "newer" / BEST_NAME).unlink()
    assert locate("latest", tmp_path) == tmp_path / "newer" / ADAPTER_NAME


def test_a_run_in_a_folder_of_the_demo_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "lora_blip_output" / "demo_caption_1" / "2026-11-01_101010_caption_tiny-blip_vit"
    run.mkdir(parents=True)
    (run / ADAPTER_NAME).touch()
    expected = (run / ADAPTER_NAME).relative_to(tmp_path)
    assert locate_initial("latest", "lora_blip_output") == locate("latest", "lora_blip_output") == expected
    with pytest.raises(AdapterError, match=f"give another run: '{run.relative_to(tmp_path)}'"):
        locate("something else")


def test_a_wrong_name_lists_runs_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most five: first those whose names contain the wrong one, then the newest. Other folders are not runs."""
    monkeypatch.chdir(tmp_path)
    names = [f"2026-11-{day:02}_101010_caption_tiny-blip_{'vit' if day == 3 else 'text'}" for day in range(1, 9)]
    for time, name in enumerate(names, 1):
        folder = tmp_path / "lora_blip_output" / name
        folder.mkdir(parents=True)
        (folder / (BEST_NAME if time == 2 else ADAPTER_NAME)).touch()
        os.utime(folder / (BEST_NAME if time == 2 else ADAPTER_NAME), (time, time))
    (tmp_path / "lora_blip_output" / "predictions").mkdir()
    with pytest.raises(AdapterError) as error:
        locate("VIT")
    listed = ", ".join(repr(f"lora_blip_output/{name}") for name in (names[2], *names[:3:-1]))
    assert str(error.value).endswith(f"; give another run, those with a similar name first: {listed}")
    with pytest.raises(AdapterError) as error:
        locate(names[7][:-1])
    listed = ", ".join(repr(f"lora_blip_output/{name}") for name in names[6:1:-1])
    assert f"did you mean 'lora_blip_output/{names[7]}'? Otherwise give another run" in str(error.value)
    assert str(error.value).endswith(listed) and "train" not in str(error.value)
    with pytest.raises(AdapterError, match="did you mean 'latest'"):
        locate("lastest")
    with pytest.raises(AdapterError) as error:
        read_adapter(f"lora_blip_output/{names[0]}x")
    assert "If it is a base" not in str(error.value)
    with pytest.raises(AdapterError, match="If it is a base"):
        read_adapter("Salesforce/blip")


def test_a_run_that_is_relative_to_another_folder_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the advice was to download the model lora_blip_output/… from the hub."""
    monkeypatch.chdir(tmp_path)
    for adapter in (
        "lora_blip_output/2026-11-03_101010_caption_tiny-blip_vit",
        "lora_blip_output/demo_caption_20261201_000638",
    ):
        with pytest.raises(AdapterError) as error:
            locate(adapter)
        message = f"no adapter at {adapter!r} in {str(tmp_path)!r}; train one: lora-blip train; or give the "
        assert str(error.value) == f"{message}full path of one"
    with pytest.raises(AdapterError, match=r"no adapter at 'user/name' in .*, and as a name on the hub: "):
        locate("user/name")


def test_a_folder_without_a_run_is_not_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package lora_blip is beside the missing lora_blip_output of a new clone. An interrupted run is suggested."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora_blip" / "data").mkdir(parents=True)
    with pytest.raises(AdapterError) as error:
        locate("latest")
    assert "did you mean" not in str(error.value) and "train one: " in str(error.value)
    (tmp_path / "lora_blip_outputs" / "run" / CHECKPOINTS_NAME).mkdir(parents=True)
    with pytest.raises(AdapterError, match="did you mean 'lora_blip_outputs'"):
        locate("lora_blip_output")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_config_that_cannot_be_read_does_not_block(tmp_path: Path) -> None:
    """A pipe has no writer and would block forever. A file that is too large is not read either."""
    (tmp_path / ADAPTER_NAME).touch()
    os.mkfifo(tmp_path / "config.json")
    assert is_adapter(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    assert not is_adapter(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip"}' + " " * LARGEST_CONFIG)
    assert is_adapter(tmp_path)
