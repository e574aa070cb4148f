"""Parquet files, save_to_disk folders and tar shards: images are unpacked once, and a crash or a damaged file is one error."""

import io
import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.prepare import packed
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError
from tests.support.shards import packed as tar_of

Lines = list[dict]


@pytest.fixture
def pa():
    """Return pyarrow, or skip the test and say so."""
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), level).save(buffer, "png")
    return buffer.getvalue()


def table(path: Path, pa, rows: list[dict]) -> Path:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def run(tmp_path: Path):
    """run(source, …) → the lines of each split. Each image must exist and have one of the expected levels."""

    def run(source: Path, **settings: object) -> dict[str, Lines]:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        files = prepare(PrepareConfig(**{"source": str(source), "output_dir": str(output), "splits": "1"} | settings))
        lines_by_split = {side: [json.loads(line) for line in path.read_text().splitlines()] for side, path in files.items()}
        for line in (line for lines in lines_by_split.values() for line in lines):
            with Image.open(output / line["image"]) as image:
                line["level"] = image.getpixel((0, 0))
        return lines_by_split

    return run


def pairs(lines: Lines) -> list[tuple[int, str]]:
    return [(line["level"], line["text"]) for line in lines]


def embedded(level: int, name: str | None = None) -> dict:
    return {"bytes": png(level), "path": name}


def test_a_struct_of_bytes_and_path_is_unpacked_next_to_the_jsonl(run, pa, tmp_path):
    """The hub's most frequent layout. An image with equal bytes is written once; the result trains."""
    rows = [{"image": embedded(level, f"{i}.png"), "text": f"text {i}"} for i, level in enumerate((10, 20, 10))]
    assert pairs(run(table(tmp_path / "x.parquet", pa, rows))["train"]) == [(10, "text 0"), (20, "text 1"), (10, "text 2")]
    assert len(list((tmp_path / "out0" / "images").iterdir())) == 2
    examples, problems = annotations.read(tmp_path / "out0" / "train.jsonl")
    assert (len(examples), problems) == (3, [])


@pytest.mark.parametrize("name", ["text", "caption", "captions", "sentences"])
def test_a_list_of_captions_is_a_line_for_each(run, pa, tmp_path, name):
    path = table(tmp_path / "x.parquet", pa, [{"image": embedded(1), name: ["one", "two"], "vector": [0.1, 0.2]}])
    (first, second) = run(path)["train"]
    assert (first["text"], second["text"]) == ("one", "two") and "vector" not in first


def test_questions_with_a_list_of_answers_or_vqav2_s_objects(run, pa, tmp_path):
    rows = [{"image": embedded(1), "question": "what?", "answers": ["a", "b"]}]
    assert run(table(tmp_path / "a.parquet", pa, rows))["train"][0]["answers"] == ["a", "b"]
    rows = [{"image": embedded(1), "question": "what?", "answers": [{"answer": "a", "answer_id": 1}]}]
    assert run(table(tmp_path / "b.parquet", pa, rows))["train"][0]["answers"] == ["a"]


def test_paths_and_plain_bytes_are_images_too(run, pa, tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(png(7))
    assert pairs(run(table(tmp_path / "a.parquet", pa, [{"image": "img/a.png", "text": "t"}]))["train"]) == [(7, "t")]
    rows = [{"image": {"bytes": None, "path": "img/a.png"}, "text": "t"}, {"image": embedded(9), "text": "u"}]
    assert pairs(run(table(tmp_path / "b.parquet", pa, rows))["train"]) == [(7, "t"), (9, "u")]
    assert pairs(run(table(tmp_path / "c.parquet", pa, [{"jpg": png(8), "caption": "t"}]))["train"]) == [(8, "t")]


def test_a_folder_of_files_keeps_its_splits(run, pa, tmp_path):
    folder = tmp_path / "set"
    for name, level in (("train-00000-of-00002", 1), ("train-00001-of-00002", 2), ("validation-00000-of-00001", 3)):
        table(folder / "data" / f"{name}.parquet", pa, [{"image": embedded(level), "text": name}])
    (folder / "dataset_infos.json").write_text("{}")
    files = run(folder)
    assert [line["level"] for line in files["train"]] == [1, 2] and [line["level"] for line in files["val"]] == [3]


def test_a_save_to_disk_folder_is_read(run, pa, tmp_path):
    folder = tmp_path / "set"
    for side, level in (("train", 1), ("test", 2)):
        (folder / side).mkdir(parents=True)
        data = pa.Table.from_pylist([{"image": embedded(level), "caption": side}])
        with pa.ipc.new_stream(str(folder / side / "data-00000-of-00001.arrow"), data.schema) as writer:
            writer.write_table(data)
        (folder / side / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    files = run(folder)
    assert {side: pairs(lines) for side, lines in files.items()} == {"train": [(1, "train")], "test": [(2, "test")]}


TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a cube"}]
PARTS = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
LLAVA = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "a cube"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": PARTS},
        {"conversations": LLAVA},
        {"texts": [{"user": "What?", "assistant": "a cube", "source": "x"}]},
        {"question": "What?", "choices": ["a cat", "a cube"], "answer": 1},
        {"query": "What?", "label": ["a cube"]},
    ],
)
def test_chats_in_parquet_are_read_with_their_image_in_a_list(run, pa, tmp_path, record):
    def one(*levels: int) -> dict:
        return {"images": [{"bytes": png(level), "path": None} for level in levels]} | record

    lines = run(table(tmp_path / "x.parquet", pa, [one(10), one(10, 20)]))["train"]
    assert [(line["question"], line["answers"]) for line in lines] == [("What?", ["a cube"])]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out0/dropped.jsonl").read_text().splitlines()]
    assert reasons == ["it has 2 images; an example has one"]


@pytest.mark.parametrize(("address", "caption"), [("URL", "TEXT"), ("image", "caption"), ("x" * 4000, "TEXT")])
def test_web_addresses_in_parquet_are_one_error_with_img2dataset_s_command(run, pa, tmp_path, address, caption):
    """LAION is published as Parquet with the columns URL and TEXT."""
    path = table(tmp_path / "laion.parquet", pa, [{address: "https://x.com/1.jpg", caption: "a cat", "WIDTH": 5}])
    given = {"image_key": address} if len(address) > 100 else {}
    with pytest.raises(DataError, match=r"web addresses instead of image paths; download the images with img2dataset") as error:
        run(path, **given)
    columns = ("URL", "TEXT") if given else (address, caption)
    assert f"--input_format parquet --url_col {columns[0]} --caption_col {columns[1]} " in str(error.value)


def test_a_metadata_parquet_names_the_images_of_its_folder(run, pa, tmp_path):
    for level, split in ((10, "train"), (20, "test")):
        table(tmp_path / f"d/{split}/metadata.parquet", pa, [{"file_name": "1.png", "text": split}])
        (tmp_path / f"d/{split}/1.png").write_bytes(png(level))
    lines = run(tmp_path / "d")
    assert {split: [line["text"] for line in lines[split]] for split in lines} == {"train": ["train"], "test": ["test"]}


def test_other_columns_are_named_by_flags(run, pa, tmp_path):
    path = table(tmp_path / "x.parquet", pa, [{"pixels": embedded(5), "words": "w"}])
    with pytest.raises(
        DataError, match="no column has a known name for the text; the columns are 'words'; name it: --text-key \"words\""
    ):
        run(path)
    assert pairs(run(path, image_key="pixels", text_key="words")["train"]) == [(5, "w")]
    bare = table(tmp_path / "bare.parquet", pa, [{"id": n, "foto": png(n), "words": f"w{n}"} for n in range(4)])
    with pytest.raises(DataError, match=r"--text-key \"words\" \(all 4 lines have this problem\)\nnothing was written$"):
        run(bare)
    assert pairs(run(bare, text_key="words", splits="1")["train"]) == [(n, f"w{n}") for n in range(4)]
    with pytest.raises(
        DataError,
        match=r"no column has the name 'photo'; the columns are pixels, words; name the column: --image-key \"pixels\"$",
    ):
        run(path, image_key="photo")
    both = table(tmp_path / "both.parquet", pa, [{"image": embedded(5), "caption": "c", "words": "w"}])
    with pytest.raises(DataError, match=r"it has no 'wrods'; its keys are .*; did you mean --text-key \"words\"\?"):
        run(both, text_key="wrods")


@pytest.mark.parametrize(
    ("image", "text"),
    [("Image", "Caption"), ("File Name", "Alt-Text"), ("image_filename", "DESCRIPTION"), ("PATH", "captions")],
)
def test_common_names_of_columns_are_known_in_any_case_and_with_spaces(run, pa, tmp_path, image, text):
    (tmp_path / "1.png").write_bytes(png(1))
    words = ["a", "b"] if text == "captions" else "a"
    lines = run(table(tmp_path / "x.parquet", pa, [{image: "1.png", text: words}]), splits="1")["train"]
    assert pairs(lines) == [(1, word) for word in words]
    assert pairs(run(tmp_path / "x.parquet", splits="1", text_key=text, image_key=image)["train"]) == [
        (1, word) for word in words
    ]


def test_unknown_columns_of_paths_give_both_flags(run, pa, tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    more = {f"Anmerkung {n} der Redaktion zu dieser Aufnahme": "" for n in range(20)}
    path = table(tmp_path / "x.parquet", pa, [{"Datei": "1.png", "Nr": 4, "Beschreibung": "eine Katze"} | more])
    with pytest.raises(DataError) as error:
        run(path)
    end = '; name the columns: --image-key "Datei" --text-key "Beschreibung"'
    assert "the columns are Datei, Nr, Beschreibung, Anmerkung 0 der" in str(error.value) and str(error.value).endswith(end)
    assert pairs(run(path, image_key="Datei", text_key="Beschreibung", splits="1")["train"]) == [(1, "eine Katze")]
    with pytest.raises(DataError, match=r"no column has the name 'Date'; .*; did you mean --image-key \"Datei\"\?$"):
        run(path, image_key="Date")


def test_a_table_without_rows_or_with_an_ambiguous_name_lists_its_columns(run, pa, tmp_path):
    empty = pa.table({"Bild": pa.array([], pa.string()), "Wort": pa.array([], pa.string())})
    pa.parquet.write_table(empty, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: no column has a known name .* Bild, Wort; name it: --image-key COLUMN$"):
        run(tmp_path / "x.parquet")
    (tmp_path / "1.png").write_bytes(png(1))
    path = table(tmp_path / "y.parquet", pa, [{"image": "1.png", "Caption": "a", "CAPTION": "b"}])
    with pytest.raises(DataError, match="the columns are 'Caption, CAPTION'; name it: --text-key"):
        run(path)


@pytest.mark.parametrize("name", ["$(touch x)", 'a"b', "it's `x`"])
def test_the_flag_of_a_column_is_safe_to_paste(run, pa, tmp_path, name):
    (tmp_path / "1.png").write_bytes(png(1))
    path = table(tmp_path / "x.parquet", pa, [{name: "1.png", "Wort": "a"}])
    with pytest.raises(DataError) as error:
        run(path)
    assert shlex.split(str(error.value).rpartition("name the columns: ")[2]) == ["--image-key", name, "--text-key", "Wort"]


def test_of_two_columns_of_images_the_user_chooses(run, pa, tmp_path):
    path = table(tmp_path / "x.parquet", pa, [{"before": embedded(1), "after": embedded(2), "caption": "c"}])
    with pytest.raises(DataError, match=r"before, after contain bytes; name that of the image: --image-key \"before\"$"):
        run(path)
    assert pairs(run(path, image_key="after")["train"]) == [(2, "c")]


def test_a_bad_row_is_named_and_an_error_leaves_no_image(run, pa, tmp_path):
    rows = [{"image": embedded(1), "text": "one"}, {"image": {"bytes": None, "path": None}, "text": "two"}]
    path = table(tmp_path / "x.parquet", pa, rows)
    with pytest.raises(DataError, match=r"x\.parquet: row 2: the column 'image' has no image"):
        run(path)
    assert not (tmp_path / "out0").exists()
    assert pairs(run(path, on_bad_data="skip")["train"]) == [(1, "one")]


def test_a_damaged_file_and_a_crash_are_one_error(run, pa, tmp_path, monkeypatch):
    path = table(tmp_path / "x.parquet", pa, [{"image": embedded(1), "text": "one"}])
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read: ") as error:
        run(tmp_path / "cut.parquet")
    assert len(str(error.value).splitlines()) == 1
    crash = tmp_path / "crash.py"
    crash.write_text(f"import os\nprint('{{\"row\"', flush=True, end='')\nos.kill(os.getpid(), {int(signal.SIGSEGV)})\n")
    monkeypatch.setattr(packed, "READER", crash)
    with pytest.raises(DataError, match="the process that read the file ended with SIGSEGV"):
        run(path)


def test_without_pyarrow_one_line_has_the_command(run, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "find_spec", lambda _: None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 something")
    with pytest.raises(
        DataError, match=r'x\.parquet is a Parquet or Arrow file; .*: pip install "lora_blip\[parquet\]"'
    ) as error:
        run(tmp_path / "x.parquet")
    assert len(str(error.value).splitlines()) == 1


def test_training_on_a_packed_file_prints_the_command(tmp_path):
    path = tmp_path / "my x.parquet"
    path.write_bytes(b"PAR1 something")
    with pytest.raises(DataError) as error:
        annotations.read(path)
    assert str(error.value).endswith(f"lora-blip prepare --source '{path}' --output-dir prepared")
    assert "then give prepared/train.jsonl" in str(error.value)


# ---------------------------------------------------------------- tar shards


def test_img2dataset_s_shards_are_unpacked(run, tmp_path, capsys):
    failed = json.dumps({"status": "failed", "caption": "x"}).encode()
    first = {"000.jpg": png(1), "000.json": b"{}", "000.txt": b"one", "001.json": failed}
    tar_of(tmp_path / "set" / "00000.tar", first)
    tar_of(tmp_path / "set" / "00001.tar", {"002.json": json.dumps({"caption": "two"}).encode(), "002.jpg": png(2)})
    (tmp_path / "set" / "00000.parquet").write_bytes(b"PAR1 only a table of the addresses")
    (tmp_path / "set" / "00000_stats.json").write_text("{}")
    assert pairs(run(tmp_path / "set")["train"]) == [(1, "one"), (2, "two")]
    assert "1 × " in capsys.readouterr().out
    with pytest.raises(DataError, match="lora-blip prepare --source"):
        annotations.read(tmp_path / "set" / "00000.tar")


def test_the_caption_of_a_shard_can_have_a_named_key(run, tmp_path):
    metadata = json.dumps({"caption": "alt", "long": "written"}).encode()
    path = tar_of(tmp_path / "a.tar", {"000.png": png(1), "000.txt": b"alt", "000.json": metadata})
    assert pairs(run(path)["train"]) == [(1, "alt")]
    assert pairs(run(path, text_key="long")["train"]) == [(1, "written")]
    with pytest.raises(DataError, match=r"it has no 'logn'; its keys are 'caption', 'long'; did you mean --text-key \"long\""):
        run(path, text_key="logn")
    bare = tar_of(tmp_path / "b.tar", {"000.png": png(1), "000.txt": b"alt"})
    with pytest.raises(DataError, match=r"it has no caption: the shard contains no \.json file of the same name"):
        run(bare, text_key="long")


def test_a_damaged_shard_is_an_error_that_names_the_last_good_sample(run, tmp_path):
    path = tar_of(tmp_path / "a.tar", {"000.png": png(1), "000.txt": b"one", "001.png": png(2), "001.txt": b"two" * 200})
    os.truncate(path, 512 * 6 + 100)
    with pytest.raises(DataError, match=r"after '000': the rest of the shard cannot be read \(.*\); download it again"):
        run(path)
    assert pairs(run(path, on_bad_data="skip")["train"]) == [(1, "one")]


def test_a_name_in_a_shard_never_leaves_the_folder(run, tmp_path):
    path = tar_of(tmp_path / "a.tar", {"../../evil.png": png(1), "../../evil.txt": b"one"})
    (line,) = run(path)["train"]
    assert line["image"].startswith("images/") and not (tmp_path.parent / "evil.png").exists()


def test_an_image_without_a_caption_in_its_shard_is_named(run, tmp_path):
    path = tar_of(tmp_path / "a.tar", {"000.png": png(1), "001.png": png(2), "001.txt": b"two"})
    with pytest.raises(DataError, match=r"a\.tar: 000: it has no caption: the shard contains no \.txt file of the same name"):
        run(path)
