"""`lora-blip caption`, `ask` and `rank`: what they print, for people and for programs, and their exit status."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

import lora_blip
from lora_blip.errors import ConfigError, InputError
from lora_blip.flags import parse
from lora_blip.inference import commands
from lora_blip.inference.commands import AskConfig, CaptionConfig, RankConfig, expand
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.runs import adapter_of

ROOT = Path(__file__).resolve().parent.parent
BASE = ("--adapter", "none", "--device", "cpu", "--model")
QUESTION = "what color is the circle?"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 3)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: object) -> tuple[int, list[str], str]:
    """Return the exit status, the lines on stdout, and stderr of a command."""
    status, output, errors = run_command(monkeypatch, capsys, *arguments)
    return status, output.splitlines(), errors


def test_a_broken_image_has_a_reason_and_the_others_have_captions(here, monkeypatch, capsys):
    """The captions are those of the Captioner, in the order of the arguments; the exit status is 1."""
    (here / "photos" / "1.png").write_bytes(b"broken")
    images = ["photos/0.png", "photos/1.png", "missing.png", "photos/2.png"]
    status, lines, errors = run(monkeypatch, capsys, "caption", *images, *BASE, ROOT / "assets" / "tiny-blip")
    captioner = lora_blip.Captioner.from_adapter(None, base=str(ROOT / "assets" / "tiny-blip"), device="cpu")
    assert status == 1
    assert lines == [f"{image}: {captioner(image).text}" for image in ("photos/0.png", "photos/2.png")]
    reasons = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(reasons) == 2 and "photos/1.png" in reasons[0] and "missing.png" in reasons[1]
    assert run(monkeypatch, capsys, "caption", "photos/0.png", *BASE, ROOT / "assets" / "tiny-blip")[:2] == (0, lines[:1])


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (("ask", QUESTION, "photos/0.png"), f"lora-blip ask photos/0.png {QUESTION!r}"),
        (("rank", "a cube", "a ball", "photos/0.png"), "lora-blip rank photos/0.png 'a cube' 'a ball'"),
    ],
)
def test_swapped_arguments_give_the_right_command(here, monkeypatch, capsys, words, right):
    status, _, errors = run(monkeypatch, capsys, *words, *BASE, ROOT / "assets" / "tiny-blip-vqa")
    assert status == 2 and f"{words[1]!r} is not an image; the image comes first: {right} --adapter none" in errors
    assert "comes first" not in run(monkeypatch, capsys, "ask", "photos/missing.png", "x.png", *BASE, ROOT)[2]
    assert here.is_dir()


@pytest.mark.parametrize(("command", "option"), [("ask", "--question"), ("rank", "--texts")])
def test_several_images_of_ask_and_rank_are_an_error(here, monkeypatch, capsys, command, option):
    """From a glob of the shell. The other images would be ranked as texts."""
    words = ("photos/0.png", "photos/1.png") if command == "ask" else ("photos/0.png", "photos/1.png", "a cube", "a ball")
    status, lines, errors = run(monkeypatch, capsys, command, *words, *BASE, ROOT / "assets" / "tiny-blip-itm")
    fix = f"for several images: lora-blip infer --images photos {option} TEXT\n"
    assert status == 2 and not lines and errors.endswith(f"'photos/1.png' is an image, and {command} takes one image; {fix}")
    assert here.is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ask", "photos", QUESTION), "'photos' is a folder, and ask takes one image; for several images: lora-blip infer"),
        (("rank", "photos", "a", "b"), "'photos' is a folder, and rank takes one image; for several images: lora-blip infer"),
        (("ask", "photos/0.png", " "), 'a text is empty; for example: lora-blip ask photos/0.png "what color is it?"'),
        (("rank", "photos/0.png", "a", ""), 'a text is empty; for example: lora-blip rank photos/0.png "a red cube"'),
        (("caption", "photos/0.png", "--num-beams", "3"), "--num-beams is not a flag of this command. lora-blip infer has it."),
    ],
)
def test_the_fix_of_a_command_is_a_command(here, monkeypatch, capsys, words, message):
    """Before, it was Python code, or the flag had no fix."""
    status, lines, errors = run(monkeypatch, capsys, *words, *BASE, ROOT / "assets" / "tiny-blip-itm")
    assert status == 2 and not lines and f"error: {message}" in errors
    assert here.is_dir()


def test_json_is_one_ascii_object_per_image(here, monkeypatch, capsys):
    """Also for a broken image, and for a file name with characters that control a terminal."""
    odd = "photos/\x1b[2J\u202e\x9b.png"
    (here / "photos" / "1.png").rename(here / odd)
    (here / "photos" / "2.png").write_bytes(b"broken")
    flags = ("--json", *BASE, ROOT / "assets" / "tiny-blip")
    status, lines, errors = run(monkeypatch, capsys, "caption", *flags, "photos/0.png", odd, "photos/2.png")
    assert status == 1 and all(line.isascii() and line.isprintable() for line in lines) and "error" not in errors
    values = [json.loads(line) for line in lines]
    assert [value["image"] for value in values] == ["photos/0.png", odd, "photos/2.png"]
    assert [set(value) for value in values] == [{"image", "text", "score"}] * 2 + [{"image", "error"}]
    assert all(value["text"] and 0 < value["score"] <= 1 for value in values[:2])


def test_a_hostile_file_name_is_escaped_for_people(here, monkeypatch, capsys):
    odd = "photos/\x1b[2J\nerror: forged.png"
    (here / "photos" / "1.png").rename(here / odd)
    status, lines, _ = run(monkeypatch, capsys, "caption", odd, *BASE, ROOT / "assets" / "tiny-blip")
    assert status == 0 and len(lines) == 1 and lines[0].startswith(r"photos/\x1b[2J\nerror: forged.png: ")


@pytest.mark.usefixtures("here")
def test_only_results_are_on_stdout(monkeypatch, capsys):
    """What the model or a check prints goes to stderr: `lora-blip caption … --json > captions.jsonl` is valid."""
    real = commands.open_captioner

    def open_captioner(*arguments):
        print("a note of the model")
        return real(*arguments)

    monkeypatch.setattr(commands, "open_captioner", open_captioner)
    base = (*BASE, ROOT / "assets" / "tiny-blip")
    for command in (("caption", "photos/0.png", "photos"), ("rank", "photos/0.png", "a red circle", "a blue square")):
        _, lines, errors = run(monkeypatch, capsys, *command, "--json", *base)
        assert "a note of the model" in errors and [json.loads(line)["image"] for line in lines]


def test_the_newest_run_is_the_default(checkpoints, here, monkeypatch, capsys):
    """Without a run, the message has the two other ways, before torch is needed."""
    status, lines, errors = run(monkeypatch, capsys, "caption", "photos/0.png")
    assert (status, lines) == (2, []) and f"no adapter at 'lora_blip_output' in {str(here)!r}" in errors
    assert "--model assets/tiny-blip-vqa" in run(monkeypatch, capsys, "ask", "photos/0.png", QUESTION)[2]
    assert "--adapter none --model assets/tiny-blip" in errors and errors.count("\n") == 1
    adapter = here / "lora_blip_output" / "run" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter_of(checkpoints["blip"], here).rename(adapter)
    status, lines, errors = run(monkeypatch, capsys, "caption", "photos/0.png", "--device", "cpu")
    captioner = lora_blip.Captioner.from_adapter(adapter, device="cpu")
    assert (status, lines) == (0, [f"photos/0.png: {captioner('photos/0.png').text}".rstrip()])
    assert f"lora_blip_output/run/adapter.safetensors (3 steps), base {checkpoints['blip']}, cpu\n" in errors
    assert run(monkeypatch, capsys, "caption", "photos/0.png", "--device", "cpu", "--adapter", adapter)[1] == lines
    errors = run(monkeypatch, capsys, "ask", "photos/0.png", QUESTION, "--device", "cpu")[2]
    another = "for another model: --adapter none --model assets/tiny-blip-vqa"
    fix = f"{another}; for this model: lora-blip caption photos/0.png --device"
    assert fix in errors


def test_the_newest_run_of_the_wanted_task_is_named(checkpoints, here, monkeypatch, capsys):
    """ "latest" answers questions, and an older run captions images."""
    for age, (name, kind) in enumerate((("2_vqa", "vqa"), ("1 captions", "blip"))):
        adapter = here / "lora_blip_output" / name / "adapter.safetensors"
        adapter.parent.mkdir(parents=True)
        adapter_of(checkpoints[kind], here).rename(adapter)
        os.utime(adapter, (time.time() - 100 * age,) * 2)
    newest = '"latest" is lora_blip_output/2_vqa, which answers questions'
    other = "The newest run that captions images: --adapter 'lora_blip_output/1 captions'"
    status, _, errors = run(monkeypatch, capsys, "infer", "--images", "photos", "--device", "cpu")
    assert status == 2 and f". {newest}. {other}\n" in errors
    for command in (("caption", "photos/0.png"), ("caption", "photos/0.png", "--explain"), ("ask", "photos/0.png", QUESTION)):
        status, _, errors = run(monkeypatch, capsys, *command, "--device", "cpu")  # the newest run of the command's task
        name = "2_vqa" if command[0] == "ask" else "1 captions"
        assert status == 0 and f"lora_blip_output/{name}/adapter.safetensors (3 steps), base" in errors, command
    assert lora_blip.Captioner.from_adapter("latest", task="caption", device="cpu")("photos/0.png").text
    assert lora_blip.Captioner.from_adapter("latest", device="cpu").task == "vqa"  # without a task, the newest of all
    Path("captions.jsonl").write_text('{"image": "photos/0.png", "text": "a cube"}\n')
    errors = run(monkeypatch, capsys, "evaluate", "--references", "captions.jsonl", "--device", "cpu")[2]
    assert "no question: the task is vqa" in errors and f". {newest}. {other}\n" in errors
    own = "the adapter lora_blip_output/2_vqa/adapter.safetensors is for the task vqa; give references of this task, or another"
    assert own in errors and "--model" not in errors  # another base would not fit the adapter
    errors = run(monkeypatch, capsys, "infer", "--images", "photos", "--adapter", "lora_blip_output/2_vqa", "--device", "cpu")[
        2
    ]
    assert f"for each. {other}\n" in errors and '"latest"' not in errors
    adapter = "lora_blip_output/1 captions"
    errors = run(monkeypatch, capsys, "ask", "photos/0.png", QUESTION, "--adapter", adapter, "--device", "cpu")[2]
    assert "The newest run that answers questions: --adapter lora_blip_output/2_vqa\n" in errors
    with pytest.raises(
        InputError, match=r"For a run of the task caption: lora_blip\.Captioner\.from_adapter\('lora_blip_output/1 captions'\)"
    ):
        lora_blip.Captioner.from_adapter("latest", device="cpu")("photos/0.png")


def test_a_question_is_answered(here, monkeypatch, capsys):
    base = ROOT / "assets" / "tiny-blip-vqa"
    answer = lora_blip.Captioner.from_adapter(None, base=str(base), device="cpu").answer("photos/0.png", QUESTION)
    assert answer.text
    status, lines, _ = run(monkeypatch, capsys, "ask", "photos/0.png", QUESTION, *BASE, base)
    assert (status, lines) == (0, [f"photos/0.png: {answer.text}"])
    _, lines, _ = run(monkeypatch, capsys, "ask", "photos/0.png", QUESTION, "--json", *BASE, base)
    value = json.loads(lines[0])
    assert (value["image"], value["question"], value["text"]) == ("photos/0.png", QUESTION, answer.text)
    (here / "photos" / "1.png").write_bytes(b"broken")
    status, lines, errors = run(monkeypatch, capsys, "ask", "photos/1.png", QUESTION, *BASE, base)
    assert (status, lines) == (1, []) and "error: photos/1.png" in errors


def test_texts_are_ranked(here, monkeypatch, capsys):
    base, texts = ROOT / "assets" / "tiny-blip-itm", ["a red circle", "a blue square", "a green triangle"]
    Image.new("RGB", (64, 64), "blue").save(here / "blue.png")
    status, lines, _ = run(monkeypatch, capsys, "rank", "blue.png", *texts, *BASE, base)
    assert status == 0 and lines[0] == "blue.png:" and sorted(line[10:] for line in lines[1:]) == sorted(texts)
    shares = [float(line[:8].rstrip("% ")) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.2
    _, printed, _ = run(monkeypatch, capsys, "rank", "blue.png", *texts, "--json", *BASE, base)
    value = json.loads(printed[0])
    assert [entry["text"] for entry in value["ranking"]] == [line[10:] for line in lines[1:]]
    assert value["text"] == value["ranking"][0]["text"] and value["score"] == value["ranking"][0]["probability"]


@pytest.mark.parametrize(
    ("arguments", "base", "fix"),
    [
        (("ask", "photos/0.png", QUESTION), "tiny-blip-itm", ""),
        (("caption", "photos/0.png"), "tiny-blip-vqa", 'lora-blip ask photos/0.png "what color is it?" --adapter none --model'),
        (
            ("caption", "photos"),
            "tiny-blip-itm",
            'lora-blip rank photos/0.png "a red cube" "a blue cube" --adapter none --model',
        ),
        (("caption", "my photo.png"), "tiny-blip-vqa", "lora-blip ask 'my photo.png' "),
        (("rank", "photos/0.png", "red", "a blue"), "tiny-blip-vqa", "lora-blip rank photos/0.png red 'a blue' --adapter none"),
        (("rank", "photos/0.png", "red", "blue"), "tiny-blip-vqa", '--question "what color is it?"\n'),
        (("caption", "photos/0.png"), "", "--model assets/tiny-blip\n"),
        (("ask", "photos/0.png", QUESTION), "", "--model assets/tiny-blip-vqa\n"),
        (("rank", "photos/0.png", "red", "blue"), "", "--model assets/tiny-blip-itm\n"),
    ],
)
def test_a_command_that_the_model_cannot_do_names_the_right_one(here, monkeypatch, capsys, arguments, base, fix):
    """The command in the error can be pasted: it has the same image, adapter, base and device."""
    (here / "my photo.png").write_bytes((here / "photos" / "0.png").read_bytes())
    status, lines, errors = run(monkeypatch, capsys, *arguments, *BASE, str(ROOT / "assets" / base) if base else "")
    assert (
        (status, lines) == (2, [])
        and fix in errors.splitlines(keepends=True)[-1]
        and errors.splitlines()[-1].startswith("error: ")
    )


def test_folders_and_globs_are_expanded(here):
    """Windows passes a glob to the program as it is. A file whose name looks like a glob is that file."""
    photos = [str(Path("photos") / f"{number}.png") for number in range(3)]
    assert list(expand(["photos"])) == list(expand([str(Path("photos") / "*.png")])) == photos
    (here / "a[1].png").touch()
    assert list(expand(["a[1].png", "nowhere.png"])) == ["a[1].png", "nowhere.png"]
    (here / "empty").mkdir()
    for nothing in ("empty", "*.jpg"):
        with pytest.raises(ConfigError, match="contains no image"):
            list(expand([nothing]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.png", "b.png", "--json", "--adapter", "x"],
        ["--json", "a.png", "--adapter", "x", "b.png"],
        ["--adapter=x", "--json", "a.png", "b.png"],
    ],
)
def test_flags_may_be_anywhere_among_the_images(arguments):
    assert parse(CaptionConfig, {}, arguments) == CaptionConfig(images=["a.png", "b.png"], adapter="x", json=True)


def test_arguments_of_ask_and_rank():
    assert parse(AskConfig, {}, ["a.png", "what is it?"]) == AskConfig(image="a.png", question="what is it?")
    ranked = RankConfig(image="a.png", texts=["-5 degrees", "warm"], question="how warm?")
    assert parse(RankConfig, {}, ["a.png", "-5 degrees", "warm", "--question", "how warm?"]) == ranked


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (CaptionConfig, [], "required: IMAGE"),
        (AskConfig, ["a.png"], "required: QUESTION"),
        (RankConfig, ["a.png"], "required: TEXT"),
        (AskConfig, ["a.png", "what", "color"], "'color' is not a flag, and does not follow a flag"),
        (CaptionConfig, ["a.png", "--adaptr", "x"], "--adaptr is not a flag; did you mean --adapter?"),
        (CaptionConfig, ["--images", "a.png"], "--images is not a flag; write IMAGE without a flag"),
    ],
)
def test_wrong_arguments_are_named(command, arguments, message):
    with pytest.raises(ConfigError) as caught:
        parse(command, {}, arguments)
    assert message in str(caught.value)


def test_a_file_instead_of_a_command_is_explained(here, monkeypatch, capsys):
    (here / "my photo.png").touch()
    status, _, errors = run(monkeypatch, capsys, "my photo.png")
    assert status == 2 and "did you mean lora-blip caption 'my photo.png'?" in errors


@pytest.mark.parametrize("explain", [False, True])
def test_scale_0_gives_the_results_of_the_base(here, checkpoints, monkeypatch, capsys, explain):
    """The texts are those of the base, and stderr names the scale. A scale that is too large is an error."""
    adapter = adapter_of(checkpoints["vqa"], here)
    words = ("ask", "photos/0.png", QUESTION, "--json", "--device", "cpu", *["--explain"] * explain)
    base = json.loads(run(monkeypatch, capsys, *words, "--adapter", "none", "--model", checkpoints["vqa"])[1][0])["text"]
    results = {}
    for scale in (0.0, 1.0):
        status, (line,), errors = run(monkeypatch, capsys, *words, "--adapter", adapter, "--scale", scale)
        results[scale] = json.loads(line)["text"]
        assert status == 0 and ("(3 steps, scaled by 0)" if scale == 0 else "(3 steps)") in errors
    assert base.startswith(results[0.0]) and not base.startswith(results[1.0])  # the adapter generates fewer tokens
    assert "scale" in run(monkeypatch, capsys, *words, "--adapter", adapter, "--scale", "1e9")[2]
    if explain:
        assert "3 steps, scaled by 0" in "".join(page.read_text() for page in here.rglob("explain.html"))
