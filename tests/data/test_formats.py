"""Test that each format becomes lines that lora_blip reads, split by image, and that faults name their line or entry."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.entries import canonical
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.prepare.part_sizes import split_fractions
from lora_blip.data.prepare.published import detokenized, load_json
from lora_blip.data.prepare.sources import find_sources
from lora_blip.data.tables import csv_entries, tsv_entries
from lora_blip.errors import ConfigError, DataError

Lines = list[dict]


def photo(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(path, format="png")


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dump(path: Path, document: object) -> Path:
    return write(path, json.dumps(document))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Lines]]:
    """Return run(source, …), which returns the lines of each written file. By default, all lines are in train."""

    def run(source: Path | str, **settings: object) -> dict[str, Lines]:
        config = PrepareConfig(**{"source": str(source), "output_dir": str(tmp_path / "out"), "splits": "1"} | settings)
        return {side: [json.loads(line) for line in path.read_text().splitlines()] for side, path in prepare(config).items()}

    return run


def texts(lines: Lines) -> list[tuple[str, str]]:
    return [(Path(line["image"]).name, line["text"]) for line in lines]


def dropped(tmp_path: Path) -> Lines:
    return [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the user's own files


def test_tsv_captions_with_comments_blank_lines_bom_and_windows_ends_read_back(run, tmp_path):
    photo(tmp_path / "a.png", tmp_path / "b.png")
    manifest = '# made by hand\r\n\r\na.png\tA  "red" cube, alone\r\nb.png\té ☃\r\n'
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbf" + manifest.encode())
    (lines,) = run(tmp_path / "x.tsv").values()
    assert texts(lines) == [("a.png", 'A "red" cube, alone'), ("b.png", "é ☃")]
    examples, problems = annotations.read(tmp_path / "out" / "train.jsonl")
    assert [(e.image, e.text) for e in examples] == [
        (tmp_path / line["image"], line["text"]) for line in lines
    ] and not problems


def test_the_answers_of_a_tsv_question_are_separated_by_a_bar(run, tmp_path):
    photo(tmp_path / "a.png")
    write(tmp_path / "x.tsv", "image\tquestion\tanswer", "a.png\twhat is  it?\ta cube | cube", "a.png\thow many?\t2")
    lines = run(tmp_path / "x.tsv")["train"]
    assert [(line["question"], line["answers"]) for line in lines] == [
        ("what is it?", ["a cube", "cube"]),
        ("how many?", ["2"]),
    ]
    assert list(lines[0]) == ["image", "question", "answers"] and Path(lines[0]["image"]) == tmp_path / "a.png"


def test_tsv_entries_are_numbered_by_line_and_a_bad_one_is_a_reason(tmp_path):
    path = write(tmp_path / "x.tsv", "# note", "a.png\tone", "", "no tab", "b.png\tq\ta|b", "a\tb\tc\td")
    entries = list(tsv_entries(path))
    assert entries[0] == (2, {"image": "a.png", "text": "one"})
    assert entries[2] == (5, {"image": "b.png", "question": "q", "answers": ["a", "b"]})
    assert [number for number, _ in entries] == [2, 4, 5, 6]
    assert "1 column between tabs" in entries[1][1] and "4 columns between tabs" in entries[3][1]


def test_only_a_first_line_that_names_columns_is_passed_over(tmp_path):
    path = write(tmp_path / "x.tsv", "image\tcaption", "image\tcaption")
    assert list(tsv_entries(path)) == [(2, {"image": "image", "text": "caption"})]


@pytest.mark.parametrize("text", ["text", "caption"])
def test_imagefolder_metadata_in_jsonl_and_csv_give_the_same_lines(run, tmp_path, text):
    photo(tmp_path / "1.png", tmp_path / "2.png")
    captions = {"1.png": "a dog, running", "2.png": 'says "hi"\non two lines'}
    write(tmp_path / "j" / "metadata.jsonl", *(json.dumps({"file_name": name, text: captions[name]}) for name in captions))
    with (tmp_path / "j" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", text), *captions.items()])
    ways = {}
    for kind in ("jsonl", "csv"):
        ways[kind] = run(tmp_path / "j" / f"metadata.{kind}", images=str(tmp_path), output_dir=str(tmp_path / kind))["train"]
    assert texts(ways["jsonl"]) == texts(ways["csv"]) == [("1.png", "a dog, running"), ("2.png", 'says "hi" on two lines')]


def test_imagefolder_s_own_folders_are_its_splits(run, tmp_path):
    for side in ("train", "validation"):
        photo(tmp_path / "set" / side / "1.png")
        write(tmp_path / "set" / side / "metadata.csv", "file_name,text", f"1.png,{side}")
    files = run(tmp_path / "set")
    assert {side: [line["text"] for line in lines] for side, lines in files.items()} == {
        "train": ["train"],
        "val": ["validation"],
    }


def test_a_csv_of_excel_in_europe_is_read(tmp_path):
    path = write(tmp_path / "x.csv", "\ufeffimage;caption", 'a.png;"red; blue, green"', "", "b.png;one", "c.png")
    assert [entry for _, entry in csv_entries(path)][:2] == [
        {"image": "a.png", "text": "red; blue, green"},
        {"image": "b.png", "text": "one"},
    ]
    number, reason = list(csv_entries(path))[2]
    assert number == 5 and "1 column but the header has 2" in reason


def test_an_open_quote_does_not_swallow_the_lines_below(tmp_path):
    path = write(tmp_path / "x.csv", "image,caption", 'a.png,"open', 'b.png,"closed"', "c.png,fine", 'd.png,"never closed')
    entries = list(csv_entries(path))
    assert [number for number, entry in entries if isinstance(entry, str)] == [2, 5]
    assert entries[1] == (4, {"image": "c.png", "text": "fine"})


def test_own_jsonl_is_split_and_keeps_its_other_keys(run, tmp_path):
    photo(tmp_path / "a.png")
    entry = {"image_path": "a.png", "caption": "one", "group": "g", "score": [1, None]}
    (line,) = run(dump(tmp_path / "x.jsonl", entry))["train"]
    assert line == {"image": str(tmp_path / "a.png"), "text": "one", "group": "g", "score": [1, None]}


def test_an_answer_may_be_text_a_list_or_vqav2_s_objects():
    for answers in ({"answer": "a"}, {"answers": ["a"]}, {"answers": [{"answer": "a", "answer_id": 1}]}, {"answer": ["a"]}):
        assert canonical({"image": "i", "question": "q"} | answers) == {"image": "i", "question": "q", "answers": ["a"]}
    for answers in ({}, {"answers": []}):
        assert "no answer" in canonical({"image": "i", "question": "q"} | answers)
    assert canonical({"image": "i", "question": "q", "answers": ["a", " "]}) == "an answer is empty"


# ---------------------------------------------------------------- published sets


def coco(folder: Path, subset: str, captions: dict[str, list[str]]) -> Path:
    """Write captions_<subset>.json with the keys of the published file."""
    images = [{"license": 3, "file_name": name, "coco_url": "http://", "id": 900 + n} for n, name in enumerate(captions)]
    pairs = [(900 + n, text) for n, name in enumerate(captions) for text in captions[name]]
    annotations = [{"image_id": image, "id": 37 + n, "caption": text} for n, (image, text) in enumerate(pairs)]
    document = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
    return dump(folder / f"captions_{subset}.json", document)


def test_coco_captions_are_found_beside_the_annotations_folder_and_split_by_file(run, tmp_path):
    photo(tmp_path / "coco" / "train2017" / "000000000009.jpg", tmp_path / "coco" / "val2017" / "000000000025.jpg")
    coco(tmp_path / "coco" / "annotations", "train2017", {"000000000009.jpg": ["A plate . ", "Closeup\nof food"]})
    coco(tmp_path / "coco" / "annotations", "val2017", {"000000000025.jpg": ["A giraffe."]})
    files = run(tmp_path / "coco" / "annotations")
    assert texts(files["train"]) == [("000000000009.jpg", "A plate ."), ("000000000009.jpg", "Closeup of food")]
    assert texts(files["val"]) == [("000000000025.jpg", "A giraffe.")] and set(files) == {"train", "val"}
    assert [e.text for e in annotations.read(tmp_path / "out" / "train.jsonl")[0]] == ["A plate .", "Closeup of food"]


def test_a_validation_file_alone_is_split_by_fractions(run, tmp_path):
    names = [f"{n:012d}.jpg" for n in range(10)]
    photo(*(tmp_path / name for name in names))
    files = run(coco(tmp_path, "val2017", {name: ["a"] for name in names}), splits="0.8,0.2")
    assert {side: len(lines) for side, lines in files.items()} == {"train": 8, "val": 2}


def vqa(folder: Path, subset: str, asked: dict[int, list[str]]) -> tuple[Path, Path]:
    """Write VQAv2's two files. asked: {image id: the answers to one question about it}."""
    head = {"info": {}, "license": {}, "data_subtype": subset, "data_type": "mscoco"}
    questions = [{"image_id": image, "question": "What  is it?", "question_id": image * 1000} for image in asked]
    entries = [
        {
            "question_type": "what is",
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": a, "answer_confidence": "maybe", "answer_id": n} for n, a in enumerate(answers, 1)],
            "image_id": image,
            "answer_type": "other",
            "question_id": image * 1000,
        }
        for image, answers in asked.items()
    ]
    return (
        dump(
            folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", head | {"task_type": "Open-Ended", "questions": questions}
        ),
        dump(folder / f"v2_mscoco_{subset}_annotations.json", head | {"annotations": list(reversed(entries))}),
    )


TEN = ["net", "net", "net", "netting", "net", "mesh", "net", "net", "Net", "net"]


def test_vqav2_keeps_all_ten_answers_and_names_images_by_subset(run, tmp_path):
    photo(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg", tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    vqa(tmp_path, "train2014", {458752: TEN})
    vqa(tmp_path, "val2014", {42: ["yes"] * 9 + [""]})
    files = run(tmp_path)
    (line,) = files["train"]
    assert line == {
        "image": str(tmp_path / "train2014" / "COCO_train2014_000000458752.jpg"),
        "question": "What is it?",
        "answers": TEN,
        "question_id": 458752000,
    }
    assert files["val"][0]["answers"] == ["yes"] * 9  # what was left empty is no answer


def test_vqav2_finds_its_other_file_and_the_renamed_images_of_2017(run, tmp_path):
    photo(tmp_path / "train2017" / "000000000007.jpg")
    questions, answers = vqa(tmp_path / "here", "train2014", {7: TEN})
    settings = {"images": str(tmp_path)}
    results = [run(source, output_dir=str(tmp_path / source.stem), **settings)["train"] for source in (questions, answers)]
    assert results[0] == results[1] and Path(results[0][0]["image"]) == tmp_path / "train2017" / "000000000007.jpg"
    (tmp_path / "there").mkdir()
    apart = answers.rename(tmp_path / "there" / answers.name)
    assert run(f"{questions},{apart}", **settings)["train"] == results[0]
    with pytest.raises(DataError, match="has VQAv2's questions, but no answers"):
        run(questions, output_dir=str(tmp_path / "no"), **settings)
    with pytest.raises(DataError, match="has VQAv2's answers, but no questions"):
        run(apart, output_dir=str(tmp_path / "no"), **settings)


def karpathy(folder: Path, splits: dict[str, str]) -> Path:
    images = [
        {
            "filename": name,
            "imgid": n,
            "split": split,
            "sentids": [n],
            "sentences": [{"tokens": ["a", "dog"], "raw": f"A dog , {name} .", "imgid": n, "sentid": n}],
        }
        | ({"filepath": "val2014", "cocoid": n} if name.startswith("COCO") else {})
        for n, (name, split) in enumerate(splits.items())
    ]
    return dump(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def test_karpathy_s_splits_are_kept_and_restval_joins_train(run, tmp_path):
    splits = {"COCO_val2014_000000000001.jpg": "restval", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test"}
    photo(tmp_path / "val2014" / "COCO_val2014_000000000001.jpg", *(tmp_path / f"{n}.jpg" for n in (2, 3, 4)))
    files = run(karpathy(tmp_path, splits))
    assert {side: [name for name, _ in texts(lines)] for side, lines in files.items()} == {
        "train": ["COCO_val2014_000000000001.jpg", "2.jpg"],
        "val": ["3.jpg"],
        "test": ["4.jpg"],
    }
    assert files["test"][0]["text"] == "A dog, 4.jpg."
    redrawn = run(tmp_path / "dataset_coco.json", own_splits=False, output_dir=str(tmp_path / "redrawn"))
    assert list(redrawn) == ["train"] and len(redrawn["train"]) == 4


FLICKR8K = """\
1000268201_693b08cb0e.jpg#0\tA child in a pink dress is climbing up a set of stairs in an entry way .
1000268201_693b08cb0e.jpg#1\tA girl going into a wooden building , alone .
1001773457_577c3a7d70.jpg#0\tA black dog and a spotted dog are fighting
2258277193_586949ec62.jpg.1#0\tpeople waiting for the subway
997722733_0cb5439472.jpg#0\tA man " climbs " a rock .
1119015538_e8e796281e.jpg#0\tone on no list
1.jpg#0\tone that is missing"""


def flickr8k(folder: Path) -> Path:
    """Write the layout of the two published archives: Flickr8k_text/ and Flickr8k_Dataset/Flicker8k_Dataset/."""
    names = dict.fromkeys(re.findall(r"^\S+?\.jpg", FLICKR8K, re.MULTILINE))
    photo(*(folder / "Flickr8k_Dataset" / "Flicker8k_Dataset" / name for name in names if name != "1.jpg"))
    texts = folder / "Flickr8k_text"
    write(texts / "Flickr_8k.trainImages.txt", "1000268201_693b08cb0e.jpg", "2258277193_586949ec62.jpg", "1.jpg")
    write(texts / "Flickr_8k.devImages.txt", "1001773457_577c3a7d70.jpg")
    write(texts / "Flickr_8k.testImages.txt", "997722733_0cb5439472.jpg")
    write(texts / "CrowdFlowerAnnotations.txt", "a.jpg\tb.jpg#2\t1\t0\t3")
    return write(texts / "Flickr8k.token.txt", FLICKR8K)


def test_flickr8k_with_its_oddities_is_read_and_split_by_its_lists(run, tmp_path, capsys):
    """A name .jpg.1, spaces before punctuation, and images that are missing or in no list do not stop `prepare`."""
    files = run(flickr8k(tmp_path).parent)
    assert texts(files["train"]) == [
        ("1000268201_693b08cb0e.jpg", "A child in a pink dress is climbing up a set of stairs in an entry way."),
        ("1000268201_693b08cb0e.jpg", "A girl going into a wooden building, alone."),
        ("2258277193_586949ec62.jpg", "people waiting for the subway"),
    ]
    assert texts(files["val"]) == [("1001773457_577c3a7d70.jpg", "A black dog and a spotted dog are fighting")]
    assert texts(files["test"]) == [("997722733_0cb5439472.jpg", 'A man " climbs " a rock.')]
    assert [(line["at"], line["why"]) for line in dropped(tmp_path)] == [(7, "missing"), (6, "unlisted")]
    printed = capsys.readouterr().out
    assert (
        "7 entries (flickr8k)" in printed
        and re.search(r"train +3 captions of 2 images", printed)
        and "left out  2 lines" in printed
        and printed.endswith(f" --annotations {tmp_path}/out/train.jsonl --val-annotations {tmp_path}/out/val.jsonl\n")
    )


def test_flickr8k_s_name_jpg_1_is_used_if_an_image_has_it(run, tmp_path):
    source = flickr8k(tmp_path)
    photo(tmp_path / "Flickr8k_Dataset" / "Flicker8k_Dataset" / "2258277193_586949ec62.jpg.1")
    assert texts(run(source)["train"])[2][0] == "2258277193_586949ec62.jpg.1"


def test_kaggle_s_captions_txt_keeps_commas_and_quotes(run, tmp_path):
    photo(tmp_path / "Images" / "a.jpg", tmp_path / "Images" / "b.jpg")
    lines = ("image,caption", 'a.jpg,"A ""red"" dog , wet , runs ."', "b.jpg,A cat .", "gone.jpg,A cow .")
    files = run(write(tmp_path / "captions.txt", *lines))
    assert texts(files["train"]) == [("a.jpg", 'A "red" dog, wet, runs.'), ("b.jpg", "A cat.")]
    assert [(line["at"], line["why"]) for line in dropped(tmp_path)] == [(4, "missing")]


def test_blip_s_own_json_lists_are_read_one_caption_or_five(run, tmp_path):
    photo(tmp_path / "val2014" / "a.jpg")
    entries = [
        {"image": "val2014/a.jpg", "caption": ["one", "two"]},
        {"image": "val2014/a.jpg", "caption": "three", "image_id": "7"},
    ]
    files = run(dump(tmp_path / "coco_karpathy.json", entries))["train"]
    assert [line["text"] for line in files] == ["one", "two", "three"] and files[2]["image_id"] == "7"
    asked = [{"question_id": 1, "question": "q", "answer": ["a", "b"], "image": "a.jpg", "dataset": "vqa"}]
    (line,) = run(dump(tmp_path / "vqa_train.json", asked), output_dir=str(tmp_path / "vqa"))["train"]
    assert (line["answers"], Path(line["image"])) == (["a", "b"], tmp_path / "val2014" / "a.jpg")


def test_a_large_json_is_held_without_a_dict_for_each_answer(tmp_path):
    _, answers = vqa(tmp_path, "train2014", {7: TEN})
    loaded = load_json(answers)["annotations"][0]["answers"]
    assert loaded == TEN and loaded[0] is loaded[1]


def test_sentences_and_answers_with_additional_keys_are_read(run, tmp_path):
    photo(tmp_path / "a.jpg", tmp_path / "000000000007.jpg")
    document = json.loads(karpathy(tmp_path, {"a.jpg": "train"}).read_text())
    document["images"][0]["sentences"][0]["lang"] = "en"
    assert texts(run(dump(tmp_path / "dataset_coco.json", document))["train"]) == [("a.jpg", "A dog, a.jpg.")]
    questions, answers = vqa(tmp_path, "train2014", {7: TEN})
    answers_document = json.loads(answers.read_text())
    answers_document["annotations"][0]["answers"][0]["lang"] = "en"
    dump(answers, answers_document)
    assert run(questions, output_dir=str(tmp_path / "vqa"))["train"][0]["answers"] == TEN
    entry = {"image": "a.jpg", "caption": "one", "raw": "One!"}  # the user's own key is no sentence of Karpathy's
    assert run(dump(tmp_path / "x.json", [entry]), output_dir=str(tmp_path / "own"))["train"][0]["raw"] == "One!"


def test_only_spaces_before_punctuation_are_removed():
    assert detokenized("a , b . c .5 ?") == "a, b. c .5?" and detokenized("... so") == "... so"


# ---------------------------------------------------------------- the split


def manifest(folder: Path, count: int, lines: int = 2) -> Path:
    photo(*(folder / "photos" / f"{n}.png" for n in range(count)))
    spelled = ["photos/{}.png", "./photos/../photos/{}.png", str(folder / "photos" / "{}.png"), "link/{}.png"]
    (folder / "link").symlink_to(folder / "photos")
    entries = ((spelled[k % 4].format(n), f"{n} {k}") for k in range(lines) for n in range(count))
    return write(folder / "x.tsv", *("\t".join(entry) for entry in entries))


def sides_of(lines_by_side: dict[str, Lines]) -> dict[str, set[str]]:
    return {side: {line["text"].split()[0] for line in lines} for side, lines in lines_by_side.items()}


def test_all_lines_of_an_image_are_in_one_split_however_they_spell_its_path(run, tmp_path):
    files = run(manifest(tmp_path, 20, lines=4), splits="0.6,0.2,0.2")
    sides = sides_of(files)
    assert {side: len(images) for side, images in sides.items()} == {"train": 12, "val": 4, "test": 4}
    assert {side: len(lines) for side, lines in files.items()} == {"train": 48, "val": 16, "test": 16}
    assert len(set.union(*sides.values())) == 20


def test_the_split_depends_on_the_seed_and_the_images_alone(run, tmp_path):
    source = manifest(tmp_path, 20)
    splits = {
        name: run(source, splits="0.5,0.5", seed=seed, output_dir=str(tmp_path / name)) for name, seed in (("a", 1), ("b", 2))
    }
    again = run(source, splits="0.5,0.5", seed=1, output_dir=str(tmp_path / "again"))
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "again" / "train.jsonl").read_bytes()
    assert sides_of(splits["a"]) != sides_of(splits["b"])
    write(source, *reversed(source.read_text().splitlines()))
    turned = run(source, splits="0.5,0.5", seed=1, output_dir=str(tmp_path / "turned"))
    assert sides_of(turned) == sides_of(again) and turned != again


def test_every_split_gets_an_image_or_it_is_an_error(run, tmp_path):
    source = manifest(tmp_path, 3)
    with pytest.raises(DataError, match="too few"):
        run(write(tmp_path / "two.tsv", "photos/0.png\ta", "photos/1.png\tb"), splits="0.8,0.1,0.1")
    assert {side: len(images) for side, images in sides_of(run(source, splits="0.9,0.05,0.05")).items()} == dict.fromkeys(
        ("train", "val", "test"), 1
    )


def test_a_split_column_is_used_and_one_image_in_two_splits_is_refused(run, tmp_path):
    photo(tmp_path / "a.png", tmp_path / "b.png")
    rows = [
        ("a.png", "1", "train"),
        ("b.png", "2", "validation"),
        ("./a.png", "3", "test"),
        ("b.png", "4", ""),
        ("b.png", "5", "x"),
    ]
    source = write(tmp_path / "x.csv", "image,text,split", *map(",".join, rows))
    with pytest.raises(DataError) as error:
        run(source)
    assert "x.csv:4: the split of its image is test here and train in an earlier line" in str(error.value)
    assert "x.csv:5: it has no split" in str(error.value) and "x.csv:6: its split is 'x', but" in str(error.value)
    files = run(source, on_bad_data="skip")
    assert {side: [line["text"] for line in lines] for side, lines in files.items()} == {"train": ["1"], "val": ["2"]}
    assert len(run(source, own_splits=False, output_dir=str(tmp_path / "all"))["train"]) == 5


# ---------------------------------------------------------------- where and whether it is written


def test_paths_are_relative_below_the_output_and_absolute_elsewhere_and_always_resolve(run, tmp_path):
    photo(tmp_path / "set" / "photos" / "a.png", tmp_path / "b.png")
    source = write(tmp_path / "x.tsv", "set/photos/a.png\tin", "b.png\tout")
    lines = run(source, output_dir=str(tmp_path / "set"))["train"]
    assert [line["image"] for line in lines] == ["photos/a.png", str(tmp_path / "b.png")]
    assert len(annotations.read(tmp_path / "set" / "train.jsonl")[0]) == 2


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "test.jsonl", "dropped.jsonl"])
def test_an_existing_file_is_an_error_before_the_source_is_read(run, tmp_path, name):
    write(tmp_path / "out" / name, "mine")
    with pytest.raises(ConfigError, match=f"{name} already exists.*--output-dir"):
        run(tmp_path / "no such source.tsv")
    assert (tmp_path / "out" / name).read_text() == "mine\n" and [p.name for p in (tmp_path / "out").iterdir()] == [name]


def test_a_refusal_leaves_no_file_and_no_folder(run, tmp_path):
    photo(tmp_path / "a.png")
    with pytest.raises(DataError):
        run(write(tmp_path / "x.tsv", "a.png\tgood", "bad"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ""}, "source is empty; give a file"),
        ({"splits": "0.9,0.2"}, "add up to 1"),
        ({"splits": "all"}, "add up to 1"),
        ({"splits": "1.5,-0.5"}, "add up to 1"),
        ({"splits": "nan,1"}, "add up to 1"),
        ({"images": "/no/such/folder"}, "images = '/no/such/folder'"),
        ({"seed": -1}, "seed"),
        ({"format": "xml"}, "one of auto"),
    ],
)
def test_an_invalid_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"source": "x"} | settings)


def test_a_split_fraction_may_be_zero_or_missing():
    assert (
        split_fractions("1") == [1, 0, 0]
        and split_fractions(" 0.8 , 0.2") == [0.8, 0.2, 0]
        and split_fractions("0.9,0,0.1") == [0.9, 0, 0.1]
    )


# ---------------------------------------------------------------- what is no good


def test_bad_lines_are_named_by_file_and_line_and_left_out_when_asked(run, tmp_path, capsys):
    photo(tmp_path / "a.png")
    bad = {
        "1 column between tabs": "only one",
        "no image": "\ttext",
        "the text is empty": "a.png\t ",
        "gone.png does not exist": "gone.png\ttext",
        "not UTF-8": "a.png\té à caf\udce9",
        "a question, but the first line has a caption": "a.png\tq\ta",
    }
    source = tmp_path / "x.tsv"
    source.write_text("\n".join(["a.png\tgood", *bad.values(), *["worse"] * 30]), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError) as error:
        run(source)
    for number, reason in enumerate(bad, 2):
        assert re.search(rf"{re.escape(str(source))}:{number}: .*{reason}", str(error.value))
    assert "… and 16 more" in str(error.value) and "--on-bad-data skip" in str(error.value) and "--images" in str(error.value)
    assert texts(run(source, on_bad_data="skip")["train"]) == [("a.png", "good")]
    assert [line["at"] for line in dropped(tmp_path)] == list(range(2, 38))
    printed = capsys.readouterr().out
    assert "left out  36 lines" in printed and f"{source}:3: no image" in printed and "… and 16 more" in printed


def test_a_file_without_a_good_line_is_refused_even_when_skipping(run, tmp_path):
    for lines in ([], ["nonsense"], ["# only a comment"]):
        with pytest.raises(DataError, match="no usable line"):
            run(write(tmp_path / "x.tsv", *lines), on_bad_data="skip")


def broken_jsons(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return {fault: (file with this fault, expected message)}."""
    photo(*(folder / f"{n}.jpg" for n in range(3)))

    def spoilt(path: Path, spoil: Callable[[dict], object], name: str) -> Path:
        document = json.loads(path.read_text())
        spoil(document)
        path.unlink()
        return dump(folder / name / path.name, document)

    def of_coco(name: str, spoil: Callable[[dict], object]) -> Path:
        return spoilt(coco(folder, "train2017", {f"{n}.jpg": ["a", "b"] for n in range(3)}), spoil, name)

    def of_karpathy(name: str, spoil: Callable[[dict], object]) -> Path:
        return spoilt(karpathy(folder, {f"{n}.jpg": "train" for n in range(3)}), spoil, name)

    return {
        "no caption": (
            of_coco("c1", lambda d: d["annotations"][5].pop("caption")),
            'annotations[5]: the key "caption" is missing',
        ),
        "null": (
            of_coco("c2", lambda d: d["annotations"][2].update(caption=None)),
            'annotations[2]: "caption" is null, expected a text',
        ),
        "an unknown image": (
            of_coco("c3", lambda d: d["annotations"][2].update(image_id=5)),
            "annotations[2]: image_id 5 is not",
        ),
        "no file name": (of_coco("c4", lambda d: d["images"][1].pop("file_name")), 'images[1]: the key "file_name" is missing'),
        "no object": (of_coco("c5", lambda d: d["annotations"].insert(1, 7)), "annotations[1]: expected an object"),
        "no sentences": (
            of_karpathy("k1", lambda d: d["images"][1].pop("sentences")),
            'images[1]: the key "sentences" is missing',
        ),
        "no raw": (
            of_karpathy("k2", lambda d: d["images"][1]["sentences"][0].pop("raw")),
            'images[1].sentences[0]: the key "raw" is missing',
        ),
        "an unknown split": (
            of_karpathy("k3", lambda d: d["images"][1].update(split="dev2")),
            "images[1]: \"split\" is 'dev2'",
        ),
    }


def test_a_bad_entry_of_a_json_is_named_and_left_out_when_asked(run, tmp_path):
    for name, (path, message) in broken_jsons(tmp_path).items():
        with pytest.raises(DataError) as error:
            run(path, images=str(tmp_path))
        assert f"{path}: {message}" in str(error.value), name
        assert len(run(path, images=str(tmp_path), on_bad_data="skip", output_dir=str(tmp_path / name))["train"]) >= 2


def test_a_bad_entry_of_either_of_vqav2_s_files_is_named(run, tmp_path):
    photo(*(tmp_path / f"{n:012d}.jpg" for n in range(6)))
    questions, answers = vqa(tmp_path, "train2014", {n: ["a"] * 10 for n in range(6)})
    questions_document, answers_document = json.loads(questions.read_text()), json.loads(answers.read_text())
    del questions_document["questions"][0]["question"]
    entries = {
        entry["image_id"]: entry for entry in answers_document["annotations"]
    }  # the file's order is reversed: image 5 is [0]
    del entries[1]["answers"][3]["answer"]
    entries[2]["answers"] = [{"answer": " ", "answer_id": 1}]
    del entries[3]["question_id"]
    entries[4]["answers"] = "yes"
    dump(questions, questions_document)
    dump(answers, answers_document)
    with pytest.raises(DataError) as error:
        run(questions)
    for message in (
        f'annotations[2] of {answers.name}: the key "question_id" is missing',
        'questions[0]: the key "question" is missing',
        f'questions[1]: {answers.name}: annotations[4].answers[3]: the key "answer" is missing',
        f"questions[2]: {answers.name}: annotations[3]: all answers are empty",
        f"questions[3]: {answers.name} has no answers to question_id 3000",
        f"questions[4]: {answers.name}: annotations[1]: \"answers\" is 'yes', expected list",
    ):
        assert f"{questions}: {message}" in str(error.value)
    assert [line["question_id"] for line in run(questions, on_bad_data="skip")["train"]] == [5000]


def test_a_file_that_is_cut_short_or_of_no_known_kind_says_so(run, tmp_path):
    whole = coco(tmp_path, "train2017", {"a.jpg": ["a"]}).read_text()
    for name, content, message in (
        ("captions_train2017.json", whole[:-20].encode(), r"captions_train2017\.json:1: it is not valid JSON .*download"),
        (
            "instances.json",
            b'{"categories": []}',
            r"the format of this JSON file is unknown \(it has the keys categories\); give another file, or convert it",
        ),
        (
            "notes.txt",
            b"hello there",
            "the format of this file is unknown; its first line is 'hello there'; give another file, or",
        ),
        ("x.csv", b"picture,words\na.png,t", r'x\.csv:1: no column has a known name for the text(.|\n)*--text-key "words"'),
        ("list.json", b'{"images": 3}', 'expected a list "images"'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            run(tmp_path / name)


def test_the_setting_format_overrides_the_detection(run, tmp_path):
    photo(tmp_path / "a.png")
    odd = write(tmp_path / "x.lst", "a.png#1\tone")
    assert find_sources(str(odd))[0].format == "flickr8k"
    with pytest.raises(DataError, match=r"'a\.png#1' does not exist there"):
        run(odd, format="tsv")
    with pytest.raises(DataError, match="not valid JSON"):
        run(odd, format="coco")


def test_a_folder_of_images_elsewhere_is_one_error_and_not_one_a_line(run, tmp_path):
    for source in (coco(tmp_path, "train2017", {f"{n}.jpg": ["a"] for n in range(50)}), write(tmp_path / "x.tsv", "a.png\ta")):
        with pytest.raises(DataError, match=r"no image of \d+ is in .*: --images FOLDER") as error:
            run(source)
        assert len(str(error.value).splitlines()) == 1


def test_a_folder_with_two_data_sets_or_none_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains neither images nor annotations; give the file that lists images and texts"):
        run(tmp_path / "empty")
    for name in ("train2014", "train2017"):
        coco(tmp_path / "two", name, {"a.jpg": ["a"]})
    with pytest.raises(DataError, match=r"several data sets \(captions_train2014\.json, captions_train2017\.json\)"):
        run(tmp_path / "two")
