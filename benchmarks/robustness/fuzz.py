"""Read thousands of damaged files: `python -m benchmarks.robustness.fuzz adapters --count 100000` (or annotations, or images).

The program makes valid files and damages them: it flips bits, cuts ends, moves parts, and replaces values of their JSON or
headers by unusual ones. The reader must read each file or raise an error of a known kind, within SECONDS and MEGABYTES. It must
not start a process, open a connection, load a pickle, or change a file outside the temporary folder. With `--engine atheris`
(extra: fuzz), coverage chooses which files are damaged further. `--only 4711` repeats the case with this number.
"""

import argparse
import csv
import faulthandler
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from lora_blip.cli import report_errors
from lora_blip.errors import AdapterError, DataError, ImageError

SECONDS, MEGABYTES = 5.0, 256  # largest time and memory for one small file
ADDRESS_SPACE = 3 * 2**30  # bytes that may be added to the start; allocating a falsely claimed size then fails
SHOWN = 25  # largest number of kinds of refusals in the table
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class", "exec.pickle")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
)
INTEGERS = [
    0,
    1,
    2,
    3,
    -1,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**9,
    10**40,
]
AWKWARD: list[Any] = [
    *INTEGERS, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), True, False, None, "", " ", "\0", "..", "../..", "/",
    "/dev/zero", "/proc/self/mem", "a/" * 3000, "x" * 300, "x" * 5000, "\ud800", "\x1b[2J", "e\u0301\u202e", "__class__",
    "lora", "{question}" * 2, [], {}, [[]], [1, 2, 3], [0, 10**9], [-1, 1], ["a"], {"a": 1}, [[[[[[1]]]]]], "nan", "1", "true",
]  # fmt: skip
for depth in (50, 150):
    AWKWARD.append(json.loads("[" * depth + "]" * depth))

Mutate = Callable[[random.Random, bytes], bytes]


# ---------------------------------------------------------------- damage


def damaged(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Return the bytes with random damage: cut, flipped, mixed with another file, overwritten, moved or inserted."""
    at, until = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            return data[:at] + rng.choice(others)[at:]
        case 3:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTEGERS) & (1 << 8 * size) - 1
            return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]
        case 4:
            return data[:at] + data[until:]
        case 5:
            return data[:until] + data[at:until] * rng.choice((1, 2, 50)) + data[until:]
        case 6:
            return data[:at] + rng.randbytes(rng.choice((1, 4, 40, 400))) + data[at:]
    return data[:at] + rng.choice((b"\0", b"\xff", b"\r", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"{", b"[")) + data[at:]


def changed(rng: random.Random, value: Any) -> Any:
    """Return a JSON value in which one part, at any depth, is replaced, removed, doubled or renamed."""
    inside = value if isinstance(value, dict | list) and value and rng.random() < 0.85 else None
    if inside is None:
        return rng.choice(AWKWARD)
    items = list(inside.items()) if isinstance(inside, dict) else list(enumerate(inside))
    index = rng.randrange(len(items))
    key, old = items[index]
    match rng.randrange(8):
        case 0:
            del items[index]
        case 1:
            name = key if isinstance(key, int) else str(rng.choice([k for k in AWKWARD if isinstance(k, str)]))
            items[index] = (name, old)
        case 2:
            items.append(rng.choice(items))
        case _:
            items[index] = (key, changed(rng, old))
    return dict(items) if isinstance(inside, dict) else [item for _, item in items]


def written(rng: random.Random, value: Any) -> str:
    """Return a value as JSON. Sometimes a key is repeated, a number is too long for Python, or brackets are nested deeply."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    match rng.randrange(40):
        case 0:
            text = re.sub(r"\d+", "9" * rng.choice((20, 400, 5000)), text, count=1)
        case 1:
            text = text.replace("{", '{"x": 1, "x": 2, ', 1)
        case 2:
            text = text.replace(": ", ": " + "[" * rng.choice((50, 5000)), 1)
    return text


# ---------------------------------------------------------------- targets


class Adapters:
    """Reads each file with `adapter.read`. If that succeeds, loads it into a tiny model and opens its task."""

    largest = 1 << 16

    def __init__(self, folder: Path) -> None:
        from lora_blip.errors import ConfigError
        from lora_blip.inference import setup
        from lora_blip.lora import adapter_file, attached, injection, targets
        from lora_blip.models import loading
        from tests.support import tiny

        with redirect_stdout(io.StringIO()):
            tiny.save_blip(folder / "blip")
            self.backbone = loading.load_backbone(str(folder / "blip"), "cpu")
        self.adapter, self.lora, self.predict = adapter_file, attached, setup
        self.allowed = (AdapterError, ConfigError)
        self.path, self.loaded = folder / "case.safetensors", 0
        task = {
            "name": "caption",
            "prompt": "a photo of",
            "generation": {"max_new_tokens": 9, "num_beams": 2, "do_sample": False},
        }
        training = {"steps": 3, "finished": True, "settings": {"annotations": "a.jsonl", "image_root": ""}}
        self.seeds = []
        for what in ("vit[0:1]:r=1", "vit.q,vit.v:r=2:alpha=3", "text[1:]:r=1"):
            for x in injection.inject(self.backbone.model, targets.find(self.backbone.model, what)).values():
                x.B.data.fill_(0.01)
            adapter_file.save(self.path, self.backbone, task=task | {"temperature": 0.07}, training=training, overwrite=True)
            injection.eject(self.backbone.model)
            self.seeds.append(self.path.read_bytes())

    def mutate(self, rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.15:
            return damaged(rng, data, self.seeds)
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            if rng.random() < 0.2:
                header = changed(rng, header)
            else:
                metadata = changed(rng, json.loads(header["__metadata__"]["lora_blip"]))
                header["__metadata__"]["lora_blip"] = written(rng, metadata)
            text = written(rng, header).encode(errors="surrogatepass")
        except (ValueError, KeyError, TypeError, RecursionError):
            return damaged(rng, data, self.seeds)
        body = data[8 + length :]
        if rng.random() < 0.1:
            body = damaged(rng, body, self.seeds)
        claimed = len(text) if rng.random() < 0.97 else rng.choice((0, 1, 8 * 2**20, 10**11, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + text + body

    def run(self, data: bytes) -> None:
        self.path.write_bytes(data)
        adapter = self.adapter.read(self.path)
        model = self.backbone.model
        try:
            self.adapter.load(self.backbone, adapter)
            self.loaded += 1
            task = self.predict.task_of(self.backbone, adapter)
            self.predict.describe(task, adapter, 1, "fp32")
        finally:
            self.lora.eject(model)


class Annotations:
    """Reads each file with `annotations.read`, and then with `prepare`."""

    largest = 1 << 16
    names = ("x.jsonl", "x.tsv", "x.csv", "Flickr8k.token.txt", "captions_train2017.json", "dataset_x.json", "list.json")

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        from lora_blip.data import annotations
        from lora_blip.data.prepare import command
        from lora_blip.errors import ConfigError

        self.folder, self.read, self.prepare = folder, annotations.read, command
        self.allowed = (DataError, ConfigError)
        for name in ("1.jpg", "2.jpg"):
            Image.new("RGB", (4, 4)).save(folder / name)
        os.mkfifo(folder / "pipe.jpg")
        (folder / "loop.jpg").symlink_to("loop.jpg")
        entries = [{"image": "1.jpg", "text": "a cube"}, {"image": "2.jpg", "question": "what?", "answers": ["a", "b"]}]
        entries += [{"image": name, "text": "t"} for name in ("pipe.jpg", "loop.jpg", "/dev/zero", "/proc/self/mem", ".")]
        jsonl = "\n".join(map(json.dumps, entries))
        table = io.StringIO()
        csv.writer(table).writerows([("image", "caption"), ("1.jpg", 'a "red", cube'), ("2.jpg", "two\nlines")])
        coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a cube"}]}
        karpathy = {"images": [{"filename": "1.jpg", "filepath": "", "split": "train", "sentences": [{"raw": "a cube ."}]}]}
        texts = (jsonl, "1.jpg\ta cube\n# note\n2.jpg\twhat?\ta|b\n", table.getvalue(), "1.jpg#0\tA cube .\n2.jpg#1\tTwo .\n")
        texts += tuple(map(json.dumps, (coco, karpathy, [{"image": "1.jpg", "caption": ["a", "b"]}])))  # type: ignore[arg-type]
        self.seeds = [
            bytes([number]) + text.encode() for number, text in enumerate(texts)
        ]  # the first byte is the index of the file name

    def mutate(self, rng: random.Random, data: bytes) -> bytes:
        kind, text = data[:1], data[1:]
        lines = text.split(b"\n")
        at = rng.randrange(len(lines))
        try:
            lines[at] = written(rng, changed(rng, json.loads(lines[at]))).encode(errors="surrogatepass")
        except (ValueError, RecursionError):
            return kind + damaged(rng, text, [seed[1:] for seed in self.seeds])
        return kind + (b"\n".join(lines) if rng.random() < 0.7 else damaged(rng, text, self.seeds))

    def run(self, data: bytes) -> None:
        where = self.folder / "source"
        path = where / self.names[data[0] % len(self.names) if data else 0]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data[1:])
        refused = None
        try:
            if path.suffix in (".jsonl", ".tsv"):
                self.read(path, image_root=self.folder, on_bad_data="skip")
        except self.allowed as error:
            refused = error
        settings = {"source": str(path), "images": str(self.folder), "output_dir": str(self.folder / "out"), "splits": "1"}
        try:
            with redirect_stdout(io.StringIO()):
                self.prepare.prepare(self.prepare.PrepareConfig(**settings, on_bad_data="skip"))
        finally:
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            path.unlink()
        if refused:
            raise refused


class Images:
    """Reads each file with `open_image`."""

    largest = 1 << 16

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        from lora_blip.data import images

        images.LARGEST = 2**23  # with the real limit, refusing an image that claims a large size takes long
        self.open_image, self.allowed, self.path = images.open_image, (ImageError,), folder / "case.img"
        noise = Image.effect_noise((24, 16), 60)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = {"save_all": True, "append_images": [noise.convert("RGB").rotate(90)]}
        kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {
            "jpeg": [("RGB", {"exif": exif}), ("RGB", {"progressive": True}), ("CMYK", {})],
            "png": [("RGB", {"exif": exif}), ("P", {"transparency": 3}), ("LA", {}), ("1", {}), ("I;16", {})],
            "webp": [("RGB", {"lossless": True}), ("RGBA", {}), ("RGB", turned)],
            "bmp": [("RGB", {}), ("P", {}), ("1", {})],
            "gif": [("P", {}), ("RGB", turned)],
            "tiff": [("RGB", {}), ("CMYK", {}), ("F", {}), ("I;16", {}), ("RGB", {"compression": "tiff_lzw"})],
        }
        kinds["tiff"] += [("RGB", {"compression": "jpeg"}), ("1", {"compression": "group4"})]
        self.seeds = []
        for kind, mode, options in ((kind, *one) for kind, some in kinds.items() for one in some):
            picture = Image.new(mode, noise.size, 40_000) if mode == "I;16" else noise.convert("RGB")
            picture = picture if mode == "I;16" else noise.convert("F") if mode == "F" else picture.convert(mode)
            picture.save(encoded := io.BytesIO(), kind, **options)
            self.seeds.append(encoded.getvalue())

    def mutate(self, rng: random.Random, data: bytes) -> bytes:
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = damaged(rng, data, self.seeds)
        return repaired(data) if data[:4] == b"\x89PNG" and rng.random() < 0.7 else data

    def run(self, data: bytes) -> None:
        self.path.write_bytes(data)
        picture = self.open_image(self.path)
        assert picture.mode == "RGB" and min(picture.size) > 0


def repaired(png: bytes) -> bytes:
    """Return a PNG with correct checksums, so that the reader does not stop before it reads the damaged chunks."""
    from zlib import crc32

    result, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        size = min(int.from_bytes(png[at : at + 4], "big"), len(png) - at - 12)
        body = png[at + 4 : at + 8 + size]
        result += png[at : at + 4] + body + crc32(body).to_bytes(4, "big")
        at += 12 + size
    return bytes(result)


def reader(kind: str, folder: Path) -> Any:
    from benchmarks.robustness.fuzz_readers import Readers

    return Readers(folder, kind)


def peft(folder: Path) -> Any:
    from benchmarks.robustness.fuzz_peft import Peft

    return Peft(folder)


READERS = (
    "tables", "xlsx", "json", "flickr30k", "exports", "kohya", "img2dataset", "shard", "parquet", "visual_genome", "gqa",
    "aokvqa", "vqa", "flickr8k", "addresses", "other_computers", "chats", "sidecars",
)  # fmt: skip
TARGETS: dict[str, Callable[[Path], Any]] = {"adapters": Adapters, "annotations": Annotations, "images": Images, "peft": peft}
TARGETS |= {kind: partial(reader, kind) for kind in READERS}
INSTRUMENTED = (  # modules whose coverage guides atheris
    "lora.adapter_file", "lora.header", "lora.peft_config", "lora.peft_format", "lora.peft_names",
    "lora.fingerprint", "runtime.untrusted", "data", "data.formats", "data.entries",
    "data.annotations", "data.prepare.published",
)  # fmt: skip


# ---------------------------------------------------------------- observation


class Watch:
    """Runs cases, and counts those that were read, refused or failed."""

    def __init__(self, target: Any, folder: Path) -> None:
        self.target, self.folder = target, str(folder)
        self.tried = self.well = self.peak = 0
        self.refused: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest = (0.0, "")
        self.trespass: list[str] = []
        sys.addaudithook(self.audit)
        resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + ADDRESS_SPACE,) * 2)
        signal.signal(signal.SIGALRM, overdue)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record a forbidden operation. Python calls this audit hook before it changes files or starts processes."""
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        # the path is relative to an open folder; an earlier call of this hook has checked that folder
        is_relative = event in CHANGES and isinstance(arguments[-1], int) and arguments[-1] >= 0
        changes_path = writes or (event in CHANGES and not is_relative)
        outside = changes_path and not str(arguments[0]).startswith((self.folder, os.devnull))
        is_child = event == "subprocess.Popen" and getattr(self.target, "may_start_processes", False)
        if outside or (event in FORBIDDEN and not is_child):
            self.trespass.append(f"{event} {arguments!r}"[:200])

    def case(self, data: bytes, name: str) -> None:
        before, started = peak_memory(), time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
        fault = ""
        try:
            self.target.run(data)
            self.well += 1
        except self.target.allowed as error:
            self.refused[kind_of(str(error), self.folder)] += 1
            fault = f"a message of {len(str(error)):,} characters" if len(str(error)) > 10_000 else ""
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        spent, more = time.perf_counter() - started, peak_memory() - before
        self.tried += 1
        self.slowest = max(self.slowest, (spent, name))
        fault = fault or (f"took {spent:.1f} s" if spent > SECONDS else f"took {more:.0f} MB" if more > MEGABYTES else "")
        fault = fault or "; ".join(self.trespass)
        self.trespass.clear()
        if fault:
            self.faults.append(f"{name}: {fault}")
            print(f"FAULT {name}: {fault}", flush=True)

    def table(self, seconds: float, start: float) -> str:
        rows = [
            ("cases", f"{self.tried:,} files in {seconds:.0f} s, {self.tried / seconds:,.0f} a second"),
            ("read", f"{self.well:,}"),
        ]
        rows += [("put on a model", f"{getattr(self.target, 'loaded', 0):,}")] * hasattr(self.target, "loaded")
        rows += [("refused", f"{self.refused.total():,}, with {len(self.refused)} different messages")]
        rows += [("", f"{count:8,}  {kind}") for kind, count in self.refused.most_common(SHOWN)]
        rows += [("slowest", f"{1000 * self.slowest[0]:.0f} ms (case {self.slowest[1]})")]
        rows += [("peak memory", f"{peak_memory():,.0f} MB, of which {start:,.0f} before the first case")]
        rows += [("faults", f"{len(self.faults)}" + "".join(f"\n{'':16}{fault}" for fault in self.faults[:SHOWN]))]
        return "\n".join(f"{name:<16}{value}" for name, value in rows)


def kind_of(message: str, folder: str) -> str:
    """Return a message without names and numbers, so that similar messages are counted together."""
    first = message.replace("\\", "/").split("\n")[0]
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\d,.]*\d", "…", re.sub(rf"{re.escape(folder)}[\w./-]*", "FILE", first))[:100]


def overdue(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"the case did not end in {2 * SECONDS:.0f} s")


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# ---------------------------------------------------------------- engines


def cases(target: Any, what: str, seed: int, numbers: range | list[int]) -> Iterator[tuple[bytes, str]]:
    """Yield (damaged file, name of the case). A case depends only on the seed and its number."""
    for number in numbers:
        rng = random.Random(f"{what} {seed} {number}")
        data = rng.choice(target.seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = target.mutate(rng, data)
        yield data, str(number)


def plain(watch: Watch, what: str, seed: int, numbers: range | list[int]) -> None:
    for data, name in cases(watch.target, what, seed, numbers):
        faulthandler.dump_traceback_later(
            60, exit=True
        )  # ends a hang that no signal ends; the file of the case is still in the folder
        watch.case(data, name)
    faulthandler.cancel_dump_traceback_later()


def guided(atheris: Any, watch: Watch, seed: int, count: int, finish: Callable[[], None]) -> None:
    """Run cases that atheris chooses by coverage. Call `finish` in the last one, because libFuzzer then ends the process."""
    corpus = Path(watch.folder) / "corpus"
    corpus.mkdir()
    for number, data in enumerate(watch.target.seeds):
        (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        watch.case(data, f"{watch.tried} of seed {seed}")
        if watch.tried == count:
            finish()

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        return atheris.Mutate(data, most) if rng.random() < 0.3 else watch.target.mutate(rng, data)[:most]

    flags = [f"-runs={count}", f"-seed={seed}", f"-max_len={watch.target.largest}", "-verbosity=0", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=TARGETS, help="the reader to test")
    parser.add_argument("--count", type=int, default=10_000, help="number of cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="repeat one case of the plain engine")
    parser.add_argument("--engine", choices=("plain", "atheris"), default="plain")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    atheris = importlib.import_module("atheris") if arguments.engine == "atheris" else None
    with atheris.instrument_imports(include=[f"lora_blip.{name}" for name in INSTRUMENTED]) if atheris else nullcontext():
        target = TARGETS[arguments.what](folder)
    empty = folder / "empty"
    empty.mkdir()
    os.chdir(empty)  # files with a relative path are written here
    watch = Watch(target, folder)
    start, started = peak_memory(), time.perf_counter()

    def finish() -> None:
        """Print the table, and remove the temporary folder. Exit with status 1 if there are faults."""
        watch.faults += [f"the reader wrote {path}" for path in empty.iterdir()]
        print(watch.table(time.perf_counter() - started, start), flush=True)
        os.chdir("/")
        shutil.rmtree(folder)
        if atheris or watch.faults:
            os._exit(bool(watch.faults))

    if atheris:
        guided(atheris, watch, arguments.seed, arguments.count, finish)
        return
    plain(watch, arguments.what, arguments.seed, range(arguments.count) if arguments.only is None else [arguments.only])
    finish()


if __name__ == "__main__":
    report_errors(main)
