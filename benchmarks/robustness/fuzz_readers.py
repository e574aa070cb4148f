"""Damaged files of each format of annotations, for `python -m benchmarks.robustness.fuzz tables` (or another format).

Each file is read as training reads it, and converted by `prepare`. A seed is a file name and its content. A name without a
suffix that is known to the reader, such as the text of an image, is read as a part of its folder.
"""

import base64
import io
import json
import random
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz import changed, damaged, written
from lora_blip.errors import ConfigError, DataError

Seeds = list[tuple[str, bytes]]  # name of a file, and its content
SETS = ("vqa", "flickr8k")  # formats of several files that are read together: the others are valid
FOLDERS = ("kohya", "sidecars", "img2dataset", *SETS)  # formats whose source is the folder
IMAGES = ("1.jpg", "2.jpg")


def tables() -> Seeds:
    rows = [("image", "caption"), ("1.jpg", 'a "red" cube, and more'), ("2.jpg", "ein Würfel – “rot”")]
    result: Seeds = []
    for suffix, delimiter in ((".csv", ","), (".csv", ";"), (".csv", "\t"), (".csv", "|"), (".tsv", "\t")):
        quoted = [
            "".join(f'{delimiter * bool(n)}"{cell.replace(chr(34), chr(34) * 2)}"' for n, cell in enumerate(row))
            for row in rows
        ]
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
            result.append((f"x{suffix}", "\r\n".join(quoted).encode(encoding)))
    result.append(("x.csv", b"Datei;Beschreibung;Datum\n1.jpg;ein Cube;1.1.\n2.jpg;zwei;2.1.\n"))
    result.append(("x.tsv", b"image\tquestion\tanswer\tsplit\n1.jpg\twhat?\ta|b\ttrain\n2.jpg\twhy?\tc\tval\n"))
    return [*result, ("x.tsv", b"1.jpg\t0\ta cube\n# note\n2.jpg\t1\ttwo\n")]


def workbooks() -> Seeds:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (("image", "caption", "n"), ("1.jpg", "a cube", 1.0), ("2.jpg", "two", None)):
        book.active.append(row)
    book.save(buffer := io.BytesIO())
    return [("x.xlsx", buffer.getvalue())]


def documents() -> Seeds:
    entries: list[Any] = [{"image": name, "captions": ["a", {"raw": "b"}]} for name in IMAGES]
    questions = [{"image": "1.jpg", "question": "what?", "answers": ["a", {"answer": "b"}], "question_id": 7}]
    examples: list[Any] = [
        entries,
        {"data": entries},
        {"annotations": entries, "info": {}},
        {"1.jpg": "a", "2.jpg": ["b", "c"]},
        questions,
    ]
    return [("x.json", json.dumps(one).encode()) for one in examples]


def flickr30k() -> Seeds:
    return [
        (
            "results.csv",
            b"image_name| comment_number| comment\n1.jpg| 0| A cube .\n2.jpg| 4   A dog .\n2.jpg| 1| Two , three .\n",
        ),
        ("captions.txt", b'image,comment_number,comment\n1.jpg,0,"A cube, red ."\n2.jpg,0,Two .\n'),
        ("results_20130124.token", b"1.jpg#0\tA cube .\n2.jpg#1\tTwo .\n"),
    ]


def exports() -> Seeds:
    vizwiz = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "a", "is_rejected": False},
            {"image_id": 1, "caption": "b", "is_precanned": True},
        ],
    }
    textcaps = {"data": [{"image_path": "1.jpg", "caption_str": "a", "set_name": "train", "reference_strs": ["a"]}]}
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    llava = [{"id": "1", "image": "1.jpg", "conversations": turns}, {"id": "2", "conversations": turns}]
    result = [{"value": {"text": ["a"]}}]
    studio = [{"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-1.jpg"}, "annotations": [{"result": result}]}]
    minimal = [{"image": "/data/upload/1/0a1b2c3d-1.jpg", "caption": {"text": ["a"]}, "annotator": 1, "annotation_id": 1}]
    examples: list[Any] = [vizwiz, textcaps, llava, studio, minimal]
    return [("x.json", json.dumps(one).encode()) for one in examples]


def visual_genome() -> Seeds:
    regions = [{"region_id": 1, "image_id": 1, "phrase": "the clock", "x": 1}, {"phrase": "a wall"}]
    documents: list[Any] = [[{"id": 1, "regions": regions}, {"id": 2, "regions": []}], [{"id": "2", "regions": regions[1:]}]]
    return [("x.json", json.dumps(one).encode()) for one in documents]


def gqa() -> Seeds:
    red = {
        "imageId": "1",
        "question": "Is it red?",
        "answer": "yes",
        "fullAnswer": "Yes, it is.",
        "semantic": [{"operation": "a"}],
    }
    return [("x.json", json.dumps({"0412": red, "7": red | {"imageId": 2, "answer": 3}}).encode())]


def aokvqa() -> Seeds:
    question = {"split": "train", "image_id": 1, "question_id": "q", "question": "What?", "direct_answers": ["a", "b"]}
    choices = {"choices": ["a", "b"], "correct_choice_idx": 0, "rationales": ["c"]}
    return [("x.json", json.dumps([question | choices, question | {"image_id": 2, "split": "val"}]).encode())]


def vqa() -> Seeds:
    questions = [
        {"image_id": 1, "question": "what?", "question_id": 10},
        {"image_id": 2, "question": "why?", "question_id": 20},
    ]
    answers = [{"question_id": one["question_id"], "answers": [{"answer": "a", "answer_id": 1}, "b"]} for one in questions]
    subset = {"data_subtype": "train2014", "info": {}}
    return [
        ("v2_OpenEnded_mscoco_train2014_questions.json", json.dumps(subset | {"questions": questions}).encode()),
        ("v2_mscoco_train2014_annotations.json", json.dumps(subset | {"annotations": answers}).encode()),
    ]


def flickr8k() -> Seeds:
    return [
        ("Flickr8k.token.txt", b"1.jpg#0\tA cube .\n1.jpg#1\tIt is red .\n2.jpg.1#0\tTwo , three .\n"),
        ("Flickr_8k.trainImages.txt", b"1.jpg\n"),
        ("Flickr_8k.devImages.txt", b"2.jpg\n"),
    ]


def addresses() -> Seeds:
    """Return data sets of web addresses, and a table in which only some cells are one."""
    web = "https://example.org/a.jpg"
    sbu = {"image_urls": [web], "captions": ["a cube"], "user_ids": [1]}
    return [
        ("x.tsv", f"a cube\t{web}\ntwo\t{web}\n".encode()),
        ("x.csv", f"image,caption,source\n1.jpg,a cube,{web}\n".encode()),
        ("x.json", json.dumps(sbu).encode()),
        ("x.jsonl", f"{json.dumps({'URL': web, 'TEXT': 'a cube'})}\n".encode()),
    ]


def other_computers() -> Seeds:
    """Return paths of Windows, with and without escaped backslashes, and of folders that do not exist here."""
    lines = (
        r'{"image": "C:\\data\\new\\1.jpg", "text": "a"}',
        r'{"image": "img\new\2.jpg", "text": "b"}',
        r'{"image": "~\\2.jpg", "text": "c"}',
    )
    rows = [{"image": "/content/drive/1.jpg", "text": "a"}, {"image": "file:///tmp/$HOME/2.jpg", "text": "b"}]
    return [
        ("x.jsonl", "\n".join(lines).encode()),
        ("x.jsonl", "\n".join(map(json.dumps, rows)).encode()),
        ("x.json", f"[{lines[1]}]".encode()),
    ]


def chats(image: bytes) -> Seeds:
    """Return chats, pairs, choices, Prodigy and Labelbox, as JSONL and as a JSON list, some with an image inside the line."""
    roles: list[Any] = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a"}]
    turns = [{"from": "human", "value": "Picture 1: <img>1.jpg</img>\nwhat?"}, {"from": "gpt", "value": "a"}]
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    answer = {"name": "Caption", "text_answer": {"content": "a"}}
    labels = {"p": {"labels": [{"annotations": {"classifications": [answer]}}]}}
    records: list[Any] = [
        {"messages": [*roles, *roles], "images": [{"bytes": None, "path": "1.jpg"}], "split": "train"},
        {"conversations": turns},
        {"messages": [{"role": "user", "content": parts}, roles[1]]},
        [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}]}, roles[1]],
        {"prompt": roles[:1], "completion": roles[1:], "images": ["2.jpg"]},
        {"images": ["1.jpg"], "texts": [{"user": "what?", "assistant": "a"}]},
        {"image": "1.jpg", "prefix": "caption en", "suffix": "a"},
        {"instruction": "what", "input": "is it?", "output": "a", "images": ["1.jpg"]},
        {"image": "1.jpg", "question": "what?", "choices": ["a", "b"], "answer": 1},
        {"image": url, "caption": "a", "answer": "accept", "_task_hash": 1, "_input_hash": 2},
        {"data_row": {"external_id": "1.jpg"}, "projects": labels},
        {"messages": roles, "images": ["https://example.org/a.jpg"]},
    ]
    lines = [("x.jsonl", json.dumps(one).encode()) for one in records]
    return [*lines, *(("x.json", json.dumps([one, one]).encode()) for one in records)]


def sidecars() -> Seeds:
    """Return JSON files next to images: of Google Takeout, of gallery-dl, and with the name of the image."""
    takeout = {"title": "1.jpg", "description": "a cube", "url": "https://example.org/a"}
    names = ("1.jpg.json", "1.json", "1.jpg.supplemental-metadata.json", "1.jpg.supplem.json")
    texts: list[Any] = [takeout, {"content": "a", "id": 7}, {"caption": "a"}, {"title": "a", "tags": ["b"]}]
    return [(name, json.dumps(text).encode()) for name, text in zip(names, texts, strict=True)]


def kohya() -> Seeds:
    meta = {"1.jpg": {"caption": "a cube", "tags": "a, b"}, "2.jpg": {"tags": "c"}}
    texts: Seeds = [
        ("1.txt", b"sks dog, sitting\n"),
        ("1.caption", b"\xef\xbb\xbfa dog"),
        ("2.jpg.txt", "drei Hühner".encode("utf-16")),
    ]
    return [*texts, ("meta_cap.json", json.dumps(meta).encode())]


def img2dataset() -> Seeds:
    status = {"key": "000000003", "status": "failed_to_download", "caption": "a"}
    return [("000000003.json", json.dumps(status).encode()), ("1.txt", b"a photo"), ("00000_stats.json", b'{"count": 3}')]


def shards(image: bytes) -> Seeds:
    def packed(form: int, **files: bytes) -> bytes:
        with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=form) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name.replace("_", "."))
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    described = json.dumps({"caption": "a cube", "status": "success"}).encode()
    files = {"0_jpg": image, "0_txt": b"a cube", "0_json": described, "1_jpg": image, "1_json": described, "2_json": described}
    return [("x.tar", packed(form, **files)) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]


def parquets(image: bytes) -> Seeds:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: list[Any] = [
        [{"image": {"bytes": image, "path": None}, "text": "a cube"}] * 3,
        [{"image": {"bytes": image, "path": "1.jpg"}, "captions": ["a", "b"]}],
        [{"image": image, "question": "what?", "answers": ["a", "b"], "question_id": 7}],
        [{"image": "1.jpg", "caption": "a", "score": 0.5}],
    ]
    result: Seeds = []
    for rows in tables:
        pq.write_table(pa.Table.from_pylist(rows), buffer := io.BytesIO())
        result.append(("x.parquet", buffer.getvalue()))
    table = pa.Table.from_pylist(tables[0])
    with pa.ipc.new_stream(stream := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    return [*result, ("x.arrow", stream.getvalue())]


SEEDS: dict[str, Callable[[bytes], Seeds]] = {
    "tables": lambda _: tables(),
    "xlsx": lambda _: workbooks(),
    "json": lambda _: documents(),
    "flickr30k": lambda _: flickr30k(),
    "exports": lambda _: exports(),
    "visual_genome": lambda _: visual_genome(),
    "gqa": lambda _: gqa(),
    "aokvqa": lambda _: aokvqa(),
    "vqa": lambda _: vqa(),
    "flickr8k": lambda _: flickr8k(),
    "addresses": lambda _: addresses(),
    "other_computers": lambda _: other_computers(),
    "chats": chats,
    "sidecars": lambda _: sidecars(),
    "kohya": lambda _: kohya(),
    "img2dataset": lambda _: img2dataset(),
    "shard": shards,
    "parquet": parquets,
}


class Readers:
    """Reads each file with `annotations.read`, and converts it with `prepare`."""

    largest = 1 << 16

    def __init__(self, folder: Path, kind: str) -> None:
        from PIL import Image

        from lora_blip.data import annotations
        from lora_blip.data.prepare import command

        self.folder, self.kind, self.read, self.prepare = folder, kind, annotations.read, command
        self.allowed = (DataError, ConfigError)
        self.may_start_processes = kind == "parquet"
        tempfile.tempdir = str(folder)  # contains the file for the errors that a child process prints
        self.source = folder / "source"
        self.source.mkdir()
        Image.new("RGB", (4, 4)).save(buffer := io.BytesIO(), "jpeg")
        vqa_names = [f"COCO_train2014_{number:012d}.jpg" for number in (1, 2)] if kind == "vqa" else []
        aokvqa_names = [f"{number:012d}.jpg" for number in (1, 2)] if kind == "aokvqa" else []
        for name in (*IMAGES, *vqa_names, *aokvqa_names):
            (self.source / name).write_bytes(buffer.getvalue())
        self.parts = SEEDS[kind](buffer.getvalue())
        self.seeds = [bytes([number]) + content for number, (_, content) in enumerate(self.parts)]

    def mutate(self, rng: random.Random, data: bytes) -> bytes:
        """Return the data with a damaged JSON value, a damaged part of a workbook, or damaged bytes."""
        head, content = data[:1], data[1:]
        others = [part for _, part in self.parts]
        if rng.random() < 0.7:
            try:
                return head + written(rng, changed(rng, json.loads(content))).encode(errors="surrogatepass")
            except (ValueError, RecursionError):
                pass
        if self.kind == "xlsx" and rng.random() < 0.7:
            return head + workbook_with_damage(rng, content)
        return head + damaged(rng, content, others)

    def run(self, data: bytes) -> None:
        path = self.source / self.parts[data[0] % len(self.parts)][0]
        for name, content in self.parts if self.kind in SETS else ():
            (self.source / name).write_bytes(content)
        path.write_bytes(data[1:])
        source = str(self.source if self.kind in FOLDERS else path)
        refused = None
        with redirect_stdout(io.StringIO()):
            try:
                self.read(source, image_root=self.source, on_bad_data="skip", report=lambda _: None)
            except self.allowed as error:
                refused = error
            settings = {"source": source, "images": str(self.source), "output_dir": str(self.folder / "out"), "splits": "1"}
            try:
                self.prepare.prepare(self.prepare.PrepareConfig(**settings, on_bad_data="skip"))
            finally:
                shutil.rmtree(self.folder / "out", ignore_errors=True)
                path.unlink()
        if refused and self.kind not in ("parquet", "shard"):  # training requires `prepare` first
            raise refused


def workbook_with_damage(rng: random.Random, content: bytes) -> bytes:
    """Return a workbook with one damaged part, or the content unchanged if it is no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # zipfile raises errors of many types for damaged bytes
        return content
    if parts:
        name = rng.choice(sorted(parts))
        parts[name] = damaged(rng, parts[name], list(parts.values()))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return buffer.getvalue()
