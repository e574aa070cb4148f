"""The scripts as users run them: settings at the top, flags of the same names, one clear message when something is wrong."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.cli import run_infer, run_train
from lora_blip.config import ConfigError, InferConfig, TrainConfig, parse
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train.py": TrainConfig, "infer.py": InferConfig}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def capitals(script: str) -> dict[str, object]:
    return {key: value for key, value in runpy.run_path(str(ROOT / script)).items() if key.isupper()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_stands_at_the_top_with_a_comment(script):
    """The script's capitals are the dataclass's fields, in its order, with its defaults; each line says what it is."""
    expected = {field.name.upper(): field.default for field in fields(SCRIPTS[script])}
    found = capitals(script)
    assert found == expected and list(found) == list(expected)
    lines = [line for line in (ROOT / script).read_text().splitlines() if re.match("[A-Z_]+ = ", line)]
    assert len(lines) == len(expected) and all(re.search(r"  # .{6,}", line) for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_documents_every_setting_at_once(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for field in fields(SCRIPTS[script]):
        assert f"--{field.name.replace('_', '-')} " in done.stdout
        assert field.metadata["doc"].split()[0] in done.stdout


def test_flags_override_the_script_and_the_script_the_defaults():
    script = {"R": 3, "TARGETS": ["vit.q", "vit.v"], "AUGMENT": False, "LR": 1}
    flags = "--r 5 --augment --targets vit,text --on-bad-data skip --no-checkpointing --val-fraction 0".split()
    assert parse(TrainConfig, script, []) == TrainConfig(r=3, targets="vit.q,vit.v", augment=False, lr=1.0)
    assert parse(TrainConfig, script, flags) == TrainConfig(
        r=5, augment=True, targets="vit,text", on_bad_data="skip", lr=1.0, val_fraction=0.0
    )
    assert parse(InferConfig, {}, ["--merge", "false", "--compare"]) == InferConfig(merge=False, compare=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"R": 0}, "r = 0: expected above 0"),
        ({"PRECISION": "fp8"}, "precision = 'fp8': expected one of auto, fp16"),
        ({"EPOCHS": "four"}, "epochs = 'four': expected int"),
        ({"VAL_FRACTION": 1.0}, "val_fraction = 1.0: expected a share"),
        ({"TASK": "poetry"}, "task = 'poetry': expected one of auto, caption"),
        ({"BATCH_SIZE": True}, "batch_size = True: expected int"),
    ],
)
def test_a_wrong_setting_is_named(wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(TrainConfig, wrong, [])


def told(capsys, run, flags: list[str], monkeypatch) -> str:
    """What a user sees of an error: one message on stderr, exit status 2, no traceback."""
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    with pytest.raises(SystemExit) as stopped:
        run({}, "")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and "Traceback" not in said
    return said


def train_flags(model: Path, source: Path, **more: object) -> list[str]:
    flags = {
        "model": model,
        "annotations": source,
        "epochs": 2,
        "batch-size": 4,
        "num-workers": 0,
        "max-new-tokens": 5,
        "r": 2,
    } | more
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_from_annotations_to_merged_captions(checkpoints, here, monkeypatch, capsys, kind):
    """train.py, then infer.py with nothing but `latest`: predictions, base beside adapter, exact match by group."""
    source = tiny.write_photos(here)
    grouped = [
        json.loads(line) | {"group": "even" if n % 2 == 0 else "odd"} for n, line in enumerate(source.read_text().splitlines())
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *train_flags(checkpoints[kind], source, lr=0.02)])
    run_train({}, "")
    (here / "refs.jsonl").write_text("\n".join(map(json.dumps, grouped)))
    said = {}
    for name, flags in {"merged": ["--compare"], "hooked": ["--merge", "false"]}.items():
        monkeypatch.setattr(
            sys, "argv", ["infer.py", "--images", "photos", "--references", "refs.jsonl", "--output-dir", name, *flags]
        )
        run_infer({}, "")
        said[name] = [json.loads(line) for line in (here / name / "predictions.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    assert [set(line) for line in said["merged"]] == [{"image", "text", "base_text"}] * 12
    assert [set(line) for line in said["hooked"]] == [{"image", "text"}] * 12
    assert [line["text"] for line in said["merged"]] == [line["text"] for line in said["hooked"]]
    assert {Path(line["image"]).name for line in said["merged"]} == {f"{n}.png" for n in range(12)}
    assert re.search(r"Image: +photos/0.png\nBase: .*\nCaption: ", printed) and re.search(r"even +6 .*%", printed)


def test_zero_shot_prompt_beams_and_sampling(checkpoints, here, monkeypatch, capsys):
    tiny.write_photos(here, 3)
    base = ["--model", str(checkpoints["blip"]), "--adapter", "none", "--images", "photos/*.png", "--max-new-tokens", "4"]
    for flags in ([], ["--prompt", "a picture of"], ["--num-beams", "3"], ["--sample"], ["--precision", "bf16"]):
        monkeypatch.setattr(sys, "argv", ["infer.py", *base, *flags])
        run_infer({}, "")
    assert len(list(here.glob("lora_blip_output/predictions_*/predictions.jsonl"))) == 5
    assert capsys.readouterr().out.count("Image:    photos/1.png\nCaption: ") == 5


def test_an_unreadable_image_is_reported_and_the_rest_is_captioned(checkpoints, here, monkeypatch, capsys):
    tiny.write_photos(here, 3)
    (here / "photos" / "1.png").write_bytes(b"broken")
    base = ["--model", str(checkpoints["blip"]), "--adapter", "none", "--images", "photos", "--output-dir", "out"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *base])
    run_infer({}, "")
    assert len((here / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert "left out: photos/1.png is no image" in capsys.readouterr().out
    assert "exists already" in told(capsys, run_infer, base, monkeypatch)  # predictions are never written over


def test_what_a_user_sees_of_each_mistake(checkpoints, here, monkeypatch, capsys):
    source = tiny.write_photos(here)
    blip, t5 = checkpoints["blip"], checkpoints["t5"]
    cases = [
        (run_train, train_flags(blip, here / "none.jsonl"), "do not exist"),
        (run_train, train_flags(here / "nowhere", source), "does not exist"),
        (run_train, train_flags(blip, source, targets="qformer"), "matches no linear"),
        (run_train, train_flags(blip, source, r=0), "r = 0"),
        (run_train, train_flags(blip, source, device="cuda:9"), "cannot be used here"),
        (run_train, train_flags(t5, source, precision="fp16"), "T5 language model, which gives NaN in fp16"),
        (
            run_infer,
            ["--model", str(t5), "--adapter", "none", "--images", "photos", "--precision", "fp16"],
            "gives NaN in fp16",
        ),
        (run_infer, ["--images", "photos"], "train one with train.py"),
        (run_infer, ["--images", "nothing/*.png"], "no image found"),
        (run_infer, ["--adapter", "none"], "set MODEL"),
        (run_train, train_flags(blip, source, targets="text_decoder.cls.predictions.decoder"), "shares its weight with"),
        (run_train, train_flags(blip, source, targets="vit:r=0"), "r is a whole number"),
        (run_train, train_flags(blip, source, seed=-1), "seed = -1"),
        (run_train, train_flags(blip, source, **{"num-beams": 0}), "num_beams = 0"),
        (run_train, train_flags(blip, source, **{"max-new-tokens": 100}), "max_new_tokens = 100"),
        (run_train, train_flags(blip, source, **{"output-dir": source}), "is no folder that can be written"),
        (run_train, train_flags(blip, source, **{"base-dtype": "bf16", "precision": "fp16"}), "same 16 bits"),
        (run_infer, ["--images", "photos/**.png"], "no image found" if sys.version_info >= (3, 13) else "is no glob"),
    ]
    for run, flags, message in cases:
        assert message in told(capsys, run, flags, monkeypatch)
    assert not (here / "lora_blip_output").exists()


def test_checkpoints_that_cannot_caption_are_refused(checkpoints, here, monkeypatch, capsys):
    """Another task's weights, a config without placeholders, missing weights, another kind of model."""
    import safetensors.torch

    source = tiny.write_photos(here)

    def broken(kind: str, change) -> Path:
        folder = here / f"broken_{len(list(here.iterdir()))}"
        folder.mkdir()
        for file in checkpoints[kind].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        return folder

    def config(**changes):
        def change(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def drop_weights(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if "text_decoder" not in key}
        safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})

    cases = {
        "has no task here": broken("blip", config(architectures=["BlipModel"])),
        "no image_token_index": broken("opt", config(image_token_index=None)),
        "they would be random": broken("blip", drop_weights),
        "'bert' model": broken("blip", config(model_type="bert", architectures=["BertModel"])),
        "cannot be loaded": broken("blip", lambda folder: (folder / "config.json").write_text("{")),
        "weights of": broken("blip", lambda folder: (folder / "model.safetensors").write_bytes(b"cut")),
        "has no tokenizer files": broken("blip", lambda f: [p.unlink() for p in f.glob("tokenizer*")]),
        "image processor of": broken("blip", lambda folder: (folder / "preprocessor_config.json").unlink()),
    }
    for message, folder in cases.items():
        assert message in told(capsys, run_train, train_flags(folder, source), monkeypatch)


def test_ctrl_c_is_no_traceback(capsys):
    from lora_blip import cli

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.tell(interrupted)
    assert stopped.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def test_a_misspelt_setting_is_named():
    with pytest.raises(ConfigError, match="EPOCH is no setting; EPOCHS is"):
        parse(TrainConfig, {"EPOCH": 3}, [])
    assert parse(TrainConfig, {"MY_ROOT": "x"}, []) == TrainConfig()


def test_the_doctor_reports(capsys, monkeypatch):
    from lora_blip.cli import main

    monkeypatch.setattr(sys, "argv", ["lora_blip", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for expected in (
        "Python",
        "torch 2",
        "cpu",
        "fp32, fp16",
        "java",
        "assets/tiny-blip: loads",
        "assets/tiny-blip2: loads",
    ):
        assert expected in said


def test_nothing_reads_or_writes_pickles():
    """Law 10: no source of the package names pickle, torch.load or torch.save."""
    for path in (ROOT / "lora_blip").rglob("*.py"):
        assert not re.search(r"\bpickle\b|torch\.(load|save)\(|weights_only", path.read_text()), path


def test_what_is_shipped_is_small_and_whole():
    for name in ("tiny-blip", "tiny-blip2"):
        folder = ROOT / "assets" / name
        assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6 and (folder / "README.md").is_file()
    train = [json.loads(line) for line in (ROOT / "annotations.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (ROOT / "image_test" / "annotations.jsonl").read_text().splitlines()]
    assert len(train) == 300 and all((ROOT / line["image"]).is_file() for line in train)
    seen = {tuple(re.findall(r"an? (\w+) cube", line["text"])) for line in train}
    unseen = [tuple(re.findall(r"an? (\w+) cube", line["text"])) for line in test if line["group"] == "unseen colour pairs"]
    assert len(unseen) == 60 and all(len(pair) == 2 and pair not in seen for pair in unseen)
    pictures = {Image.open(ROOT / line["image"]).tobytes() for line in train}
    assert not any(Image.open(ROOT / "image_test" / line["image"]).tobytes() in pictures for line in test)
