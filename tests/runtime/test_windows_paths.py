"""A path that was copied from Windows is recognized on other systems."""

import os
from pathlib import Path

import pytest

from lora_blip.runtime.user_paths import missing_annotations, nearest_path


@pytest.mark.skipif(os.sep != "/", reason="Windows itself accepts both separators")
def test_the_same_path_with_slashes_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data", "photos").mkdir(parents=True)
    Path("data", "captions.csv").write_text("image,text\n")
    assert nearest_path(r"data\captions.csv") == "data/captions.csv"
    assert nearest_path(r"data\caption.csv") == "data/captions.csv"
    assert nearest_path(r".\data\photos", folders=True) == "./data/photos"
    assert nearest_path(r"data\captions.csv", folders=True) == ""
    assert "did you mean 'data/captions.csv'?" in str(missing_annotations(r"data\captions.csv"))
