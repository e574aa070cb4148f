"""Test the inputs, the time limits and the outputs of the Java programs, without starting Java."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_blip.errors import JavaError
from lora_blip.metrics import java

PACKAGE = Path("/package")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace `_run` and return its calls. Each call returns the next of `answers`, or calls it with the arguments."""
    calls: list[dict[str, Any]] = []

    def run(name: str, arguments: list[str], stdin: str, limit: float) -> str:
        calls.append({"name": name, "arguments": arguments, "stdin": stdin, "limit": limit})
        answer = answers.pop(0)
        return answer(arguments) if callable(answer) else answer

    answers: list[Any] = []
    monkeypatch.setattr(java, "_run", run)
    return SimpleNamespace(calls=calls, answers=answers)


def test_the_tokenizer_gets_one_line_per_caption_and_its_marks_are_removed(ran):
    ran.answers.append("a red , cube .\n\n-lrb- b\n")
    texts = java.tokenize(["A red,\ncube.", "\t", "( B\udc80"], PACKAGE)
    assert texts == ["a red cube", "", "-lrb- b"]
    (call,) = ran.calls
    assert (
        call["stdin"] == "A red, cube.\n\n( B?\n" and call["limit"] == pytest.approx(180.3) and call["name"] == "PTBTokenizer"
    )
    assert call["arguments"] == [
        "-cp", "/package/tokenizer/stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines", "-lowerCase", "-encoding", "UTF-8",
    ]  # fmt: skip
    ran.answers.append("a\nb\n")
    with pytest.raises(JavaError, match="returned 2 lines for 1 captions"):
        java.tokenize(["a b"], PACKAGE)


def spice_answers(scores: list[Any]) -> Any:
    def answer(arguments: list[str]) -> str:
        requests = json.loads(Path(arguments[arguments.index("-silent") - 3]).read_text(encoding="utf-8"))
        assert requests == [
            {"image_id": 0, "test": "é", "refs": ["a", "b"]}, {"image_id": 1, "test": "c", "refs": ["d"]}
        ]  # fmt: skip
        items = [{"image_id": place, "scores": {"All": {"f": score}}} for place, score in scores]
        Path(arguments[arguments.index("-out") + 1]).write_text(json.dumps(items), encoding="utf-8")
        return ""

    return answer


def test_spice_gets_every_image_with_its_references_and_a_time_limit(ran, tmp_path):
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in java.SPICE_MODELS:
        with pytest.raises(JavaError, match=name.replace(".", r"\.")):
            java.spice(["é", "c"], [["a", "b"], ["d"]], tmp_path)
        (tmp_path / "spice" / "lib" / name).touch()
    ran.answers.append(spice_answers([(1, 0.25), (0, 0.75)]))
    assert java.spice(["é", "c"], [["a", "b"], ["d"]], tmp_path) == (0.5, [0.75, 0.25])
    (call,) = ran.calls
    assert (call["name"], call["stdin"], call["limit"]) == (
        "SPICE",
        "",
        pytest.approx(182.0),
    )  # ten captions per image
    assert call["arguments"][:3] == ["-Xmx8G", "-jar", str(tmp_path / "spice" / "spice-1.0.jar")]
    ran.answers.append(spice_answers([(1, None), (0, 0.75)]))
    mean, by_image = java.spice(["é", "c"], [["a", "b"], ["d"]], tmp_path)
    assert math.isnan(mean) and by_image[0] == 0.75 and math.isnan(by_image[1])
    for scores in ([(0, 0.75)], [(0, "x"), (1, 1)]):
        ran.answers.append(spice_answers(scores))
        with pytest.raises(JavaError, match=r"unreadable scores \((Key|Value)Error"):
            java.spice(["é", "c"], [["a", "b"], ["d"]], tmp_path)


def test_meteor_is_called_by_its_protocol_with_a_time_limit(monkeypatch):
    requests: list[tuple[str, int]] = []
    started: list[tuple[list[str], float]] = []

    def ask(line: str, answers: int) -> list[str]:
        requests.append((line, answers))
        return [f"{len(requests)} {n}" for n in range(answers)] if line.startswith("SCORE") else ["0.25", "0.5", "0.75"]

    @contextmanager
    def talking(command: list[str], limit: float) -> Iterator[Any]:
        started.append((command, limit))
        yield ask

    monkeypatch.setattr(java, "_conversation", talking)
    monkeypatch.setattr(java, "java", lambda: "/bin/java")
    assert java.meteor(["a  b", "c"], [["d|||e", "f"], ["g"]], PACKAGE) == (0.75, [0.25, 0.5])
    assert requests == [("SCORE ||| d e ||| f ||| a b", 1), ("SCORE ||| g ||| c", 1), ("EVAL ||| 1 0 ||| 2 0", 3)]
    ((command, limit),) = started
    assert limit == pytest.approx(180.2) and command[0] == "/bin/java"
    tail = ["-Xmx2G", "-jar", "/package/meteor/meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    assert command[-len(tail) :] == tail and "-Duser.language=en" in command


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Create a `java` that is a shell script."""
    path = tmp_path / "bin" / "java"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_program_s_output_is_text_and_its_last_line_of_error_is_the_reason(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, 'cat; echo " $1"')
    assert java._run("X", ["--last"], "é\n", 5.0) == f"é\n {java.OPTIONS[0]}\n"
    for script, reason in (
        ("echo first >&2; echo last >&2; echo >&2; exit 3", "X failed with exit status 3: last"),
        ("exit 4", "X failed with exit status 4: it wrote nothing"),
        (f"echo '{java.NOTICE}_JAVA_OPTIONS: x' >&2; exit 5", "X failed with exit status 5: it wrote nothing"),
        (f"echo {'y' * 300} >&2; exit 6", f"X failed with exit status 6: {'y' * 200}"),
    ):
        fake(tmp_path, monkeypatch, script)
        with pytest.raises(JavaError) as raised:
            java._run("X", [], "", 5.0)
        assert str(raised.value) == reason
    fake(tmp_path, monkeypatch, "exec sleep 20")
    with pytest.raises(JavaError, match="X was stopped after 1 s"):
        java._run("X", [], "", 0.6)


def test_a_conversation_ends_its_process_after_the_block(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, 'while read -r line; do echo "$line!"; echo " two "; done')
    with java._conversation([java.java()], 5.0) as ask:
        assert ask("é", 2) == ["é!", "two"] and ask("b", 1) == ["b!"]
    for script, reason in (("echo why >&2; exit 1", "METEOR failed .*why"), ("exec sleep 20", "METEOR was stopped after 1 s")):
        fake(tmp_path, monkeypatch, script)
        with pytest.raises(JavaError, match=reason), java._conversation([java.java()], 0.6) as ask:
            float(ask("x" * 100_000, 1)[0])
    with pytest.raises(JavaError, match="Java did not start"), java._conversation([str(tmp_path / "none")], 5.0):
        pass


def test_a_missing_java_is_one_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JavaError, match="no `java` command"):
        java.java()
    monkeypatch.setattr(java, "java", lambda: str(tmp_path / "none"))
    with pytest.raises(JavaError, match="Java did not start"):
        java._run("X", [], "", 5.0)
