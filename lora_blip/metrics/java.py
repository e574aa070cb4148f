"""Run the Java programs of the COCO caption evaluation: PTBTokenizer, METEOR 1.5 and SPICE 1.0, each with a time limit.

The jars are those of `pycocoevalcap`. Its Python wrappers are not used, because they write into site-packages, wait forever
for a process that has crashed, and download a model for SPICE. This module downloads nothing and ends every process. Each
failure is a JavaError with a message of one line.
"""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_blip.errors import JavaError
from lora_blip.metrics.tokens import without_punctuation

START, EACH = 180.0, 0.1  # time limit in seconds: START for a process, and EACH for each caption or image
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")  # not in pycocoevalcap's package

# The programs write numbers in the system's language. METEOR fails to read its own numbers with a decimal comma.
FIXED = {"language": "en", "country": "US", "region": "US", "script": "", "variant": "", "extensions": ""}
LOCALE = [f"-Duser.{key}{use}={value}" for key, value in FIXED.items() for use in ("", ".format", ".display")]
OPTIONS = [*LOCALE, "-Dfile.encoding=UTF-8"]
NOTICE = "Picked up "  # start of Java's message on stderr about options in the environment


def java() -> str:
    """Return the path of the `java` command. Raise JavaError if there is none."""
    path = shutil.which("java")
    if path is None:
        raise JavaError("no `java` command was found; install Java 8 or newer, such as: apt install default-jre-headless")
    return path


def environment() -> dict[str, str]:
    """Return the environment for Java. Its options make Java write English numbers on every system.

    They are added at the end of `_JAVA_OPTIONS`, which overrides the command line and JAVA_TOOL_OPTIONS. The last option wins.
    """
    return os.environ | {"_JAVA_OPTIONS": " ".join([os.environ.get("_JAVA_OPTIONS", ""), *OPTIONS]).strip()}


def tokenize(captions: list[str], package: Path) -> list[str]:
    """Tokenize captions with PTBTokenizer (Stanford CoreNLP 3.4.1): lower case, no punctuation, words joined by spaces.

    package: the folder of pycocoevalcap. Raise JavaError on failure.
    """
    jar = package / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = "".join(one_line(caption) + "\n" for caption in captions)
    written = _run(
        "PTBTokenizer", ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options], lines, _limit(len(captions))
    )
    tokenized = written.removesuffix("\n").split("\n")
    if len(tokenized) != len(captions):
        raise JavaError(f"PTBTokenizer returned {len(tokenized)} lines for {len(captions)} captions")
    return [without_punctuation(line.rstrip().split(" ")) for line in tokenized]


def one_line(caption: str) -> str:
    """Return a caption in one line, with one space between words and "?" for characters that UTF-8 cannot encode."""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


def meteor(predictions: list[str], references: list[list[str]], package: Path) -> tuple[float, list[float]]:
    """Return METEOR 1.5 for English, with normalisation, of the set and by image (Denkowski and Lavie 2014).

    The score of the set is computed from summed counts, so it is not the mean of the scores by image.
    Raise JavaError on failure.
    """
    jar = package / "meteor" / "meteor-1.5.jar"
    command = [java(), *OPTIONS, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with _conversation(command, _limit(len(predictions))) as ask:
        counts = []
        for prediction, texts in zip(predictions, references, strict=True):
            fields = [" ".join(one_line(text).replace("|||", " ").split()) for text in [*texts, prediction]]
            counts.append(ask("SCORE ||| " + " ||| ".join(fields), 1)[0])
        *by_image, of_set = (float(line) for line in ask("EVAL ||| " + " ||| ".join(counts), len(counts) + 1))
    return of_set, by_image


def spice(predictions: list[str], references: list[list[str]], package: Path) -> tuple[float, list[float]]:
    """Return SPICE (Anderson et al. 2016), the F score of scene-graph tuples: mean and by image. Raise JavaError on failure."""
    folder = package / "spice"
    missing = [name for name in SPICE_MODELS if not (folder / "lib" / name).is_file()]
    if missing:
        raise JavaError(
            f"SPICE needs {' and '.join(missing)} in {folder / 'lib'}; with internet, "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads them"
        )
    rows = zip(predictions, references, strict=True)
    items = [{"image_id": index, "test": text, "refs": texts} for index, (text, texts) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as temporary:
        input_file, result = Path(temporary, "captions.json"), Path(temporary, "scores.json")
        input_file.write_text(json.dumps(items), encoding="utf-8")
        command = ["-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), str(input_file), "-out", str(result), "-silent"]
        _run("SPICE", command, "", _limit(10 * len(items)))
        try:
            scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(result.read_text(encoding="utf-8"))}
            by_image = [float("nan" if scores[index] is None else scores[index]) for index in range(len(items))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JavaError(f"SPICE wrote unreadable scores ({type(error).__name__}: {error})") from None
    return sum(by_image) / len(by_image), by_image


def _limit(items: int) -> float:
    return START + EACH * items


def _run(name: str, arguments: list[str], text: str, limit: float) -> str:
    """Return the output of a Java program for an input. Raise JavaError if it fails or takes more than `limit` seconds."""
    try:
        process = subprocess.run(
            [java(), *OPTIONS, *arguments], input=text.encode(), capture_output=True, timeout=limit, check=False,
            env=environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise JavaError(f"{name} was stopped after {limit:.0f} s") from None
    except OSError as error:
        raise JavaError(f"Java did not start ({error})") from None
    if process.returncode:
        raise JavaError(f"{name} failed with exit status {process.returncode}: {_last_line(process.stderr)}")
    return process.stdout.decode("utf-8", "replace")


@contextmanager
def _conversation(command: list[str], limit: float) -> Iterator[Callable[[str, int], list[str]]]:
    """Start a process, and yield a function `ask(line, answers)` that sends a line and returns `answers` lines.

    The process is ended after the block. Raise JavaError if the process fails or runs longer than `limit` seconds.
    """
    timed_out = threading.Event()
    # stderr is a file, because nothing reads it until the end, and a full pipe would block Java
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment()
            )  # fmt: skip
        except OSError as error:
            raise JavaError(f"Java did not start ({error})") from None
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def ask(line: str, answers: int) -> list[str]:
            stdin.write(line.encode() + b"\n")
            stdin.flush()
            return [stdout.readline().decode().strip() for _ in range(answers)]

        def stop() -> None:
            timed_out.set()
            process.kill()  # `readline` then returns ""

        timer = threading.Timer(limit, stop)
        timer.daemon = True
        timer.start()
        try:
            yield ask
        except (OSError, ValueError) as error:  # a broken pipe, or an answer that is not a number
            process.kill()
            process.wait()
            errors.seek(0)
            end = f"was stopped after {limit:.0f} s" if timed_out.is_set() else f"failed ({error}): {_last_line(errors.read())}"
            raise JavaError(f"METEOR {end}") from None
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            stdout.close()
            with suppress(OSError):  # the process has ended, so close cannot send the rest
                stdin.close()


def _last_line(written: bytes) -> str:
    lines = written.decode("utf-8", "replace").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(NOTICE)]
    return lines[-1][:200] if lines else "it wrote nothing"
