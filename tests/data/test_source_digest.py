"""The digest of the annotations depends on the content of every file, and not on their paths."""

import os

from lora_blip.data.source_digest import END, source_digest


def test_the_digest_changes_with_the_size_the_start_and_the_end_of_each_file(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    content = bytearray(os.urandom(3 * END))
    seen = []
    for change in ("first", "copy", "start", "end", "shorter"):
        content[0] ^= change == "start"
        content[-1] ^= change == "end"
        one.write_bytes(content[: -1 if change == "shorter" else None])
        seen.append(source_digest(str(one)))
    assert seen[0] == seen[1] and len(set(seen)) == 4 and all(len(digest) == 16 for digest in seen)
    two.write_text("a")
    several = source_digest(f"{one}, {two}")
    two.write_text("b")
    assert len({several, source_digest(f"{one},{two}"), source_digest(str(one))}) == 3


def test_what_is_no_file_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (str(tmp_path), str(tmp_path / "gone.jsonl"), "/dev/zero", str(tmp_path / "pipe"), "hf://name"):
        assert source_digest(source) == ""
