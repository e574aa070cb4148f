"""The scripts as users run them: settings at the top, flags of the same names, one clear message when something is wrong."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lora_blip.cli import run_infer, run_train
from lora_blip.config import InferConfig, TrainConfig
from lora_blip.errors import ConfigError
from lora_blip.flags import parse
from tests.support import tiny
from tests.support.runs import train_flags

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
        ({"EPOCHS": "four"}, "epochs = 'four': expected a whole number"),
        ({"VAL_FRACTION": 1.0}, "val_fraction = 1.0: expected a share"),
        ({"TASK": "poetry"}, "task = 'poetry': expected one of auto, caption"),
        ({"BATCH_SIZE": True}, "batch_size = True: expected a whole number"),
    ],
)
def test_a_wrong_setting_is_named(wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(TrainConfig, wrong, [])


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("num_beams=3,top_p=0.9", {"top_p": 0.9}),
        ("do_sample=true, temperature=1e-1", {"do_sample": True, "temperature": 0.1}),
        ("early_stopping=never,renormalize_logits=FALSE", {"early_stopping": "never", "renormalize_logits": False}),
        ("bad_words_ids=[[5],[7,8]],top_k=null", {"bad_words_ids": [[5], [7, 8]], "top_k": None}),
        ('watermarking_config={"bias": 2.0, "a": "b,c"},min_length=3', {
            "watermarking_config": {"bias": 2.0, "a": "b,c"}, "min_length": 3}),
        ('{"num_beams": 3, "sequence_bias": [[[5], -1.0]]}', {"sequence_bias": [[[5], -1.0]]}),
    ],
)  # fmt: skip
def test_generation_options_in_a_flag(flag, options):
    """JSON values and words. Options that are settings too go to these settings."""
    config = parse(TrainConfig, {"GENERATION": {"top_p": 0.1}}, ["--generation", flag])
    assert config.generation == options and config.num_beams == (3 if "num_beams" in flag else 1)
    assert config == TrainConfig(generation=options, num_beams=config.num_beams)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("num_beams", "'num_beams' is not NAME=VALUE; write num_beams=3,length_penalty=1.5"),
        ("top_p=", "is not NAME=VALUE"),
        ("top_p=0.9,top_p=0.8", "top_p is given twice"),
        ("top_p=__import__('os')", "top_p=__import__('os'): the value is not JSON"),
        ("bad_words_ids=[[5]", "the value is not JSON"),
        ('{"top_p": 0.9', "is not JSON"),
        ('{"top_p": 1, "top_p": 2}', "occurs twice"),
        ("num_beams=0", "generation: num_beams = 0: expected a whole number above 0"),
        ("num_beams=three", "generation: num_beams = 'three': expected a whole number above 0"),
        ("max_new_tokens=true", "generation: max_new_tokens = True"),
    ],
)
def test_wrong_generation_options_in_a_flag_are_one_error(flag, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(TrainConfig, {}, ["--generation", flag])


def test_an_option_and_its_setting_have_one_value():
    """Equal values are one value, and a setting at its default has none. Two different values are an error."""
    for kind in (TrainConfig, InferConfig):
        assert kind(generation={"num_beams": 3, "max_new_tokens": 9}) == kind(num_beams=3, max_new_tokens=9)
        assert kind(generation={"num_beams": 3}, num_beams=3).num_beams == 3
        assert kind(generation={"num_beams": None, "top_k": None}).generation == {"num_beams": None, "top_k": None}
        with pytest.raises(ConfigError, match=r"num_beams = 5, but generation has num_beams = 3; remove num_beams from"):
            kind(generation={"num_beams": 3}, num_beams=5)
        with pytest.raises(ConfigError, match=r"num_beams = 5, but generation has num_beams = None"):
            kind(generation={"num_beams": None}, num_beams=5)
    assert InferConfig(generation={"do_sample": True}) == InferConfig(sample=True)
    assert InferConfig(generation={"do_sample": False}).generation == {"do_sample": False}  # against an adapter that samples
    with pytest.raises(ConfigError, match=r"sample = True, but generation has do_sample = False"):
        InferConfig(generation={"do_sample": False}, sample=True)
    for wrong in ("num_beams=3", ["num_beams"], {1: 2}, {"a": {1, 2}}, {"a": math.nan}):
        with pytest.raises(ConfigError, match="expected names and values"):
            TrainConfig(generation=wrong)


def error_of(capsys, run, flags: list[str], monkeypatch) -> str:
    """Return the message of a command that fails: one error on stderr, exit status 2, no traceback."""
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    with pytest.raises(SystemExit) as stopped:
        run({}, "")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ") and "Traceback" not in message
    return message


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
    lines_of = {}
    for name, flags in {"merged": ["--compare"], "hooked": ["--merge", "false"]}.items():
        monkeypatch.setattr(
            sys, "argv", ["infer.py", "--images", "photos", "--references", "refs.jsonl", "--output-dir", name, *flags]
        )
        run_infer({}, "")
        lines_of[name] = [json.loads(line) for line in (here / name / "predictions.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    assert [set(line) for line in lines_of["merged"]] == [{"image", "text", "base_text"}] * 12
    assert [set(line) for line in lines_of["hooked"]] == [{"image", "text"}] * 12
    assert [line["text"] for line in lines_of["merged"]] == [line["text"] for line in lines_of["hooked"]]
    assert {Path(line["image"]).name for line in lines_of["merged"]} == {f"{n}.png" for n in range(12)}
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
    assert "left out: photos/1.png is not a usable image" in capsys.readouterr().out
    fresh_only = [*base, "--resume", "false"]
    assert "exists already" in error_of(capsys, run_infer, fresh_only, monkeypatch)  # predictions are never written over


@pytest.mark.slow
def test_a_broken_pipe_does_not_stop_a_run(checkpoints, here):
    """`train.py | head -1`: the pipe breaks at the second line, and the run ends as it would have."""
    flags = train_flags(checkpoints["blip"], tiny.write_photos(here))
    code = "import sys; from lora_blip.cli import run_train; sys.argv[0] = 'train.py'; run_train({}, '')"
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    os.close(writer)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert list(here.rglob("adapter.safetensors"))


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
        (run_infer, ["--images", "photos"], "train one: lora-blip train"),
        (run_infer, ["--images", "nothing/*.png"], "no image found"),
        (run_infer, ["--adapter", "none"], "set MODEL"),
        (run_train, train_flags(blip, source, targets="text_decoder.cls.predictions.decoder"), "shares its weight with"),
        (run_train, train_flags(blip, source, targets="vit:r=0"), "r must be a whole number"),
        (run_train, train_flags(blip, source, seed=-1), "seed = -1"),
        (run_train, train_flags(blip, source, **{"num-beams": 0}), "num_beams = 0"),
        (run_train, train_flags(blip, source, **{"max-new-tokens": 100}), "max_new_tokens = 100"),
        (run_train, train_flags(blip, source, **{"output-dir": source}), "it is not a folder"),
        (run_train, train_flags(blip, source, **{"base-dtype": "bf16", "precision": "fp16"}), "set both to the same"),
        (run_infer, ["--images", "photos/**.png"], "no image found" if sys.version_info >= (3, 13) else "is not a valid glob"),
    ]
    for run, flags, message in cases:
        assert message in error_of(capsys, run, flags, monkeypatch)
    assert not (here / "lora_blip_output").exists()


def test_checkpoints_that_cannot_caption_are_refused(checkpoints, here, monkeypatch, capsys):
    """Another task's weights, missing weights, another kind of model."""
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
        "which would be random": broken("blip", drop_weights),
        "'bert' model": broken("blip", config(model_type="bert", architectures=["BertModel"])),
        "cannot be loaded": broken("blip", lambda folder: (folder / "config.json").write_text("{")),
        "weights of": broken("blip", lambda folder: (folder / "model.safetensors").write_bytes(b"cut")),
        "has no tokenizer files": broken("blip", lambda f: [p.unlink() for p in f.glob("tokenizer*")]),
        "image processor of": broken("blip", lambda folder: (folder / "preprocessor_config.json").unlink()),
    }
    for message, folder in cases.items():
        assert message in error_of(capsys, run_train, train_flags(folder, source), monkeypatch)


def test_ctrl_c_is_no_traceback(capsys):
    from lora_blip import cli

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.report_errors(interrupted)
    assert stopped.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"EPOCH": 3}, "EPOCH is not a setting; did you mean EPOCHS?"),
        ({"RANK": 4}, "RANK is not a setting; did you mean R?"),
        ({"LEARNING_RATE": 1e-4}, "LEARNING_RATE is not a setting; did you mean LR?"),
        ({"LORA_ALPHA": 16}, "did you mean ALPHA?"),
        ({"BATCH": 16}, "did you mean BATCH_SIZE?"),
        ({"MY_ROOT": "x"}, "To add a variable, start its name with _: _MY_ROOT"),
        ({"EXTRA": None}, "EXTRA is not a setting"),
        ({"batch_size": 4}, "batch_size is not a setting; write BATCH_SIZE"),
        ({"Batch_Size": 4}, "Batch_Size is not a setting; write BATCH_SIZE"),
        ({"batchsize": 4}, "batchsize is not a setting; write BATCH_SIZE"),
        ({"Epochs": 4}, "Epochs is not a setting; write EPOCHS"),
        ({"rank": 4}, "rank is not a setting; write R."),
        ({"learning_rate": 4}, "learning_rate is not a setting; write LR."),
        ({"IMAGE_DIR": Path("photos")}, "IMAGE_DIR is not a setting"),
        ({"RANKS": range(4)}, "RANKS is not a setting"),
    ],
)
def test_a_name_of_the_script_that_is_no_setting_is_an_error(script, message):
    """A setting that has no effect is an error that names the nearest one."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(TrainConfig, script, [])


def test_names_of_the_users_own_are_free():
    """A leading underscore, lower case, and modules, classes and functions in upper case are no settings."""
    own = {"_ROOT": "x", "root": "y", "texts": 1, "PIL": json, "XY": Path, "F": print, "__name__": "__main__"}
    assert parse(TrainConfig, own, []) == TrainConfig()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank 4", "--rank is not a flag; did you mean --r?"),
        ("--batch 4", "--batch is not a flag; did you mean --batch-size?"),
        ("--learning-rate=1", "--learning-rate is not a flag; did you mean --lr?"),
        ("--target vit", "did you mean --targets?"),
        ("--epochs 3 4", "'4' is not a flag"),
        ("--epochs four", "argument --epochs: invalid int value"),
        ("--resume", "argument --resume: expected one argument"),
    ],
)
def test_a_flag_that_is_no_setting_is_an_error(flags, message):
    """No abbreviation is accepted, and the error names the nearest flag."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(TrainConfig, {}, flags.split())


@pytest.mark.parametrize("command", ["prepare", "evaluate", "doctor"])
def test_commands_refuse_unknown_flags(command, monkeypatch, capsys):
    from lora_blip.cli import main

    monkeypatch.setattr(sys, "argv", ["lora_blip", command, "--seeed", "3"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: --seeed is not a flag")


@pytest.mark.parametrize(
    "wrong",
    [
        {"LR": math.inf}, {"LR": 1e9}, {"LR": 10**400}, {"ALPHA": math.nan}, {"ALPHA": 1e300}, {"DROPOUT": math.nan},
        {"VAL_FRACTION": math.nan}, {"WEIGHT_DECAY": math.inf}, {"MAX_GRAD_NORM": math.inf}, {"CACHE_GB": math.inf},
        {"CHECKPOINT_SECONDS": math.inf}, {"MIN_IMPROVEMENT": math.nan}, {"MIN_IMPROVEMENT": -1.0}, {"SEED": 2**32},
        {"R": 10**9}, {"BATCH_SIZE": 10**12}, {"MAX_STEPS": 10**30}, {"TARGETS": ["vit", 3]}, {"TARGETS": None},
        {"MODEL": b"x"}, {"MODEL": "a\0b"}, {"AUGMENT": 1}, {"EPOCHS": 3.0}, {"R": "8"},
    ],
)  # fmt: skip
def test_a_setting_with_an_absurd_value_is_an_error_before_any_work(wrong):
    """Not finite, out of range, or of the wrong type: a ConfigError that names the setting."""
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name.lower()} = "):
        parse(TrainConfig, wrong, [])


@pytest.mark.parametrize("kind", ["dangling", "loop", "file", "below a file", "device", "special", "long"])
def test_an_output_folder_that_cannot_be_made_is_one_error(checkpoints, here, monkeypatch, capsys, kind):
    """train.py, infer.py, prepare and evaluate all refuse it at once, and leave nothing behind."""
    from lora_blip.cli import report_errors, run_command

    source = tiny.write_photos(here, 2)
    (here / "dangling").symlink_to(here / "nowhere")
    (here / "loop").symlink_to(here / "loop")
    (here / "file").touch()
    folder = {"below a file": "file/x", "device": "/dev/null/x", "special": "/proc/x/y", "long": "x" * 300}.get(kind, kind)
    before = sorted(here.rglob("*"))
    base = ["--model", str(checkpoints["blip"]), "--adapter", "none", "--output-dir", folder]

    def command(name: str, flags: list[str]):
        return lambda *_: report_errors(lambda: run_command(name, flags))

    runs = [
        (run_train, train_flags(checkpoints["blip"], source, **{"output-dir": folder})),
        (run_infer, ["--images", "photos", *base]),
        (command("prepare", ["--source", str(source), "--output-dir", folder]), []),
        (command("evaluate", ["--references", str(source), *base]), []),
    ]
    for run, flags in runs:
        message = error_of(capsys, run, flags, monkeypatch)
        assert message.startswith(f"error: output_dir = {folder!r}: ") and message.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_a_default_output_folder_that_is_a_dangling_link_is_one_error(checkpoints, here, monkeypatch, capsys):
    tiny.write_photos(here, 2)
    (here / "lora_blip_output").symlink_to(here / "nowhere")
    flags = ["--images", "photos", "--model", str(checkpoints["blip"]), "--adapter", "none"]
    assert "it is a link to a missing folder" in error_of(capsys, run_infer, flags, monkeypatch)


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_an_ascii_terminal_prints_escapes(environment):
    """Every command prints its help, a caption and an error, whatever the terminal's encoding."""
    code = (
        "import sys; from lora_blip.cli import main, run_train, run_infer, report_errors\n"
        "from lora_blip.config import ConfigError\n"
        "def fail(): print('\\u4e2d\\u6587'); raise ConfigError('\\xe7\\xe0')\n"
        "for act in (lambda: run_train({}, ''), lambda: run_infer({}, ''), lambda: report_errors(fail), main):\n"
        "    try: act()\n"
        "    except SystemExit as end: print(end.code)\n"
        "    sys.argv[1:] = ['prepare', '--help']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert r"\u4e2d\u6587" in done.stdout and r"error: \xe7\xe0" in done.stderr and "[--SETTING VALUE] ..." in done.stdout


@pytest.mark.loads
def test_a_limit_of_processes_is_named(monkeypatch, capsys):
    """`ulimit -u`: the advice is about threads and processes, whatever was being done."""
    from lora_blip.cli import report_errors
    from lora_blip.models import loading

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(loading.BlipForConditionalGeneration, "from_pretrained", refuse)
    for act in (
        lambda: loading.load_backbone("assets/tiny-blip", "cpu"),
        lambda: (_ for _ in ()).throw(BlockingIOError(11, "Resource temporarily unavailable")),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.chdir(ROOT)
            report_errors(lambda act=act: next(act()))
        assert "allows no more threads or processes (ulimit -u)" in capsys.readouterr().err


def test_a_limit_of_processes_is_found_whatever_the_error_says(monkeypatch, capsys):
    """OpenMP ends the program at the limit, and another thread then fails with some message of its own."""
    from lora_blip.cli import report_errors

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def fail() -> None:
        raise TypeError("unknown parameter type")

    with pytest.raises(TypeError, match="unknown parameter type"):
        report_errors(fail)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(SystemExit):
        report_errors(fail)
    assert "allows no more threads or processes (ulimit -u)" in capsys.readouterr().err


class Ending(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os._exit(7)


def test_a_loading_process_that_is_killed_is_one_error_with_the_setting(capsys):
    """Out of memory, /dev/shm or processes: PyTorch's error names none of them, and no setting."""
    from lora_blip.cli import report_errors

    with pytest.raises(SystemExit) as stopped:
        report_errors(lambda: print(*DataLoader(Ending(), num_workers=1)))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.startswith("error: a process that loads images was ended")
    assert "--num-workers 0" in printed and printed.count("\n") == 1


def test_the_doctor_reports(capsys, monkeypatch):
    from lora_blip.cli import main

    monkeypatch.setattr(sys, "argv", ["lora_blip", "doctor"])
    main()  # SystemExit if a base does not work
    printed = capsys.readouterr().out
    for expected in (
        "Python",
        "torch 2",
        "cpu",
        "fp32, fp16",
        "java",
        "assets/tiny-blip: works",
        "assets/tiny-blip2: works",
    ):
        assert expected in printed


def test_nothing_reads_or_writes_pickles():
    """Law 10: no source of the package names pickle or torch.save; torch.load is only in the child process for `.bin` files."""
    for path in (ROOT / "lora_blip").rglob("*.py"):
        if path.name == "bin_reader.py":
            assert re.findall(r"torch\.load\(.*weights_only=(\w+)", path.read_text()) == ["True", "True"]
            assert path.read_text().count("torch.load(") == 2
            continue
        assert not re.search(r"\bpickle\b|torch\.(load|save)\(|weights_only", path.read_text()), path


def test_what_is_shipped_is_small_and_whole():
    for name in ("tiny-blip", "tiny-blip2"):
        folder = ROOT / "assets" / name
        assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6 and (folder / "README.md").is_file()
    train = [json.loads(line) for line in (ROOT / "annotations.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (ROOT / "image_test" / "annotations.jsonl").read_text().splitlines()]
    assert len(train) == 300 and all((ROOT / line["image"]).is_file() for line in train)
    pairs = {tuple(re.findall(r"an? (\w+) cube", line["text"])) for line in train}
    unseen = [tuple(re.findall(r"an? (\w+) cube", line["text"])) for line in test if line["group"] == "unseen colour pairs"]
    assert len(unseen) == 60 and all(len(pair) == 2 and pair not in pairs for pair in unseen)
    pictures = {Image.open(ROOT / line["image"]).tobytes() for line in train}
    assert not any(Image.open(ROOT / "image_test" / line["image"]).tobytes() in pictures for line in test)


# ---------------------------------------------------------------- infer.py: texts, questions, references


def inferred(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, *flags: object) -> list[dict]:
    """The lines of predictions.jsonl."""
    monkeypatch.setattr(sys, "argv", ["infer.py", "--images", "photos", "--output-dir", name, *map(str, flags)])
    run_infer({}, "")
    return [json.loads(line) for line in (here / name / "predictions.jsonl").read_text().splitlines()]


def as_it_is(checkpoint: Path) -> list[object]:
    return ["--model", checkpoint, "--adapter", "none", "--max-new-tokens", 5]


@pytest.mark.parametrize("kind", ["blip", "opt", "itm"])
def test_texts_are_ranked_from_a_file_or_from_the_flag(checkpoints, here, monkeypatch, capsys, kind):
    """Every line holds all texts, the likeliest first and as its text, with probabilities that sum to 1."""
    tiny.write_photos(here, 4)
    texts = ["a red cube", "two cubes", "nothing"]
    (here / "texts.txt").write_text("\ufeffa red cube\n\n  two   cubes \nnothing\na red cube\n")
    lines = inferred(here, monkeypatch, "a", *as_it_is(checkpoints[kind]), "--texts", "texts.txt")
    flagged = inferred(here, monkeypatch, "b", *as_it_is(checkpoints[kind]), "--texts", "a red cube|two cubes| nothing")
    assert lines == flagged and len(lines) == 4
    for line in lines:
        odds = [entry["probability"] for entry in line["ranking"]]
        assert (
            sorted(entry["text"] for entry in line["ranking"]) == sorted(texts) and line["text"] == line["ranking"][0]["text"]
        )
        assert odds == sorted(odds, reverse=True) and sum(odds) == pytest.approx(1, abs=1e-5)
    assert re.search(r"Image: +photos/0.png\nFits: +\d+\.\d%  " + lines[0]["text"], capsys.readouterr().out)


def test_texts_of_another_encoding_are_read_and_a_table_is_refused(checkpoints, here, monkeypatch, capsys):
    """Before, cp1252 was an error for this setting alone, and the header of a table was ranked as a text."""
    tiny.write_photos(here, 1)
    (here / "texts.txt").write_bytes("a café cube\ntwo cubes\n".encode("cp1252"))
    (line,) = inferred(here, monkeypatch, "a", *as_it_is(checkpoints["blip"]), "--texts", "texts.txt")
    assert {each["text"] for each in line["ranking"]} == {"a café cube", "two cubes"}
    (here / "texts.csv").write_text("text;number\na cube;1\n")
    (here / "broken.txt").write_bytes(b"caf\xc3\xa9 caf\xc3\xa9\ncaf\xff\n")
    for name, message in (
        ("texts.csv", "is a table; save its column of texts as a .txt file"),
        ("broken.txt", "not UTF-8; save"),
    ):
        flags = ["--images", "photos", *map(str, as_it_is(checkpoints["blip"])), "--texts", name]
        assert message in error_of(capsys, run_infer, flags, monkeypatch)


def test_references_that_are_not_among_the_ranked_texts_are_reported(checkpoints, here, monkeypatch, capsys):
    """They lower the score, whatever the model predicts."""
    source = tiny.write_photos(here, 3, texts=["a red cube", "Two cubes.", "a dog"])
    flags = [*as_it_is(checkpoints["blip"]), "--texts", "a red cube|two cubes", "--references", source]
    inferred(here, monkeypatch, "a", *flags)
    assert "1 image of 3 cannot be right: no reference of it is among the texts to rank\n" in capsys.readouterr().out


def test_questions_are_asked_of_an_adapter_that_answers(checkpoints, here, monkeypatch, capsys):
    """A captioner becomes an answerer by its template; then one question for every image, or a file of them."""
    source = tiny.write_photos(here)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    asked = [
        {"image": line["image"], "question": question, "answers": [answer], "group": group}
        for line in lines
        for question, answer, group in (
            ("what is it?", "a cube", "things"),
            ("what colour is it?", line["text"][2:7], "colours"),
        )
    ]
    (here / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    template = "Question: {question} Answer:"
    flags = train_flags(checkpoints["opt"], here / "asked.jsonl", task="vqa", prompt=template, targets="qformer,lm", lr=0.02)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    run_train({}, "")
    one = inferred(here, monkeypatch, "one", "--question", "what  is it?", "--compare", "--references", "asked.jsonl")
    assert [set(line) for line in one] == [{"image", "question", "text", "base_text"}] * 12
    assert {line["question"] for line in one} == {"what is it?"}
    printed = capsys.readouterr().out
    assert "Question: what is it?\nBase:" in printed and re.search(r"VQA accuracy +questions +base +adapted", printed)
    assert re.search(r"\nall +12 ", printed) and "colours" not in printed.split("VQA accuracy")[-1]
    for flags in (("--question", "asked.jsonl"), ("--references", "asked.jsonl")):
        both = inferred(here, monkeypatch, flags[0][2:], *flags)
        answers = {(Path(line["image"]).name, line["question"]): line["text"] for line in both}
        assert len(answers) == 24 == len(both)
        assert all(answers[Path(line["image"]).name, line["question"]] == line["text"] for line in one)
    assert re.search(r"colours +12 .*%\s+.*all +24 ", capsys.readouterr().out, re.DOTALL)
    ranked = inferred(here, monkeypatch, "ranked", "--question", "what is it?", "--texts", "a cube|a ball")
    assert {line["question"] for line in ranked} == {"what is it?"}
    assert all(sum(e["probability"] for e in line["ranking"]) == pytest.approx(1, abs=1e-5) for line in ranked)


def test_scores_of_the_base_alone_are_not_called_adapted(checkpoints, here, monkeypatch, capsys):
    source = tiny.write_photos(here, 3)
    inferred(here, monkeypatch, "out", *as_it_is(checkpoints["blip"]), "--references", source)
    assert re.search(r"exact match +images +base\s*\nall +3 +0\.0%", capsys.readouterr().out)


def test_a_missing_question_is_named(checkpoints, here, monkeypatch, capsys):
    tiny.write_photos(here, 2)
    vqa, itm, blip = (as_it_is(checkpoints[kind]) for kind in ("vqa", "itm", "blip"))
    (here / "one.txt").write_text("a cube\n")
    (here / "others.jsonl").write_text('{"image": "elsewhere.png", "question": "what is it?"}\n')
    (here / "captions.jsonl").write_text('{"image": "photos/0.png", "text": "a cube"}\n')
    cases = [
        (vqa, [], "there is no question; set QUESTION (or --question) to 'what color is it?'"),
        (vqa, ["--question", "others.jsonl"], "has no line for any of 2 images"),
        (
            vqa,
            ["--question", "captions.jsonl"],
            "captions.jsonl: no line has a question; if its texts are the questions: --question-key text",
        ),
        (vqa, ["--question", "what is it? " * 60], "the question has too many tokens"),
        (vqa, ["--question", "what is [SEP] it?"], "which the model uses as a special token"),
        (itm, [], "the task retrieval ranks texts; set TEXTS (or --texts) to 'a red cube|a blue cube'"),
        (blip, ["--texts", "one.txt"], "at least two texts are needed to rank"),
        (blip, ["--texts", "no such file.txt"], "there is no such file"),
        (
            blip,
            ["--question", "what is it?"],
            "the task caption uses no question; set QUESTION (or --question) to '', or ADAPTER (or --adapter) to an adapter",
        ),
        (blip, ["--texts", "x" * 5000], "at least two texts are needed to rank"),
        (blip, ["--texts", "a cube|" + "cube " * 90], "texts: text 2: the text has 90 tokens"),
        (blip, ["--task", "vqa", "--prompt", "no place for it", "--question", "what?"], "contains {question} once"),
        (blip, ["--references", "gone.jsonl"], "do not exist"),
        (itm, ["--task", "caption"], "give a checkpoint of"),
    ]
    for base, flags, message in cases:
        assert message in error_of(capsys, run_infer, ["--images", "photos", *map(str, base), *flags], monkeypatch), (
            flags,
            message,
        )
    assert not (here / "lora_blip_output").exists()


def test_predictions_printed_before_an_error_are_in_the_file(checkpoints, here, monkeypatch):
    """Killed in the middle, or by an error for good: every prediction that was printed is a whole line of the file."""
    from lora_blip.tasks.caption import CaptionTask

    tiny.write_photos(here, 6)
    real, batch_sizes = CaptionTask.predict, []

    def predict(task, pictures, examples, adapters=None):
        if len(batch_sizes) == 2:
            written = (here / "out" / "predictions.jsonl").read_text()  # not when it is closed: a kill closes nothing
            assert [Path(json.loads(line)["image"]).name for line in written.splitlines()] == [
                "0.png",
                "1.png",
                "2.png",
                "3.png",
            ]
            raise ZeroDivisionError
        batch_sizes.append(len(examples))
        return real(task, pictures, examples, adapters)

    monkeypatch.setattr(CaptionTask, "predict", predict)
    with pytest.raises(ZeroDivisionError):
        inferred(here, monkeypatch, "out", *as_it_is(checkpoints["blip"]), "--batch-size", 2)
    assert len((here / "out" / "predictions.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_file_name_that_is_no_unicode_costs_nothing(checkpoints, here, monkeypatch):
    tiny.write_photos(here, 2)
    odd = Path("photos") / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (here / "photos" / "0.png").rename(here / odd)
    lines = inferred(here, monkeypatch, "out", *as_it_is(checkpoints["blip"]))
    assert {line["image"] for line in lines} == {"photos/1.png", str(odd)}
