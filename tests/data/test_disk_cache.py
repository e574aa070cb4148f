"""Test that the cache returns the stored value or None, after kills, damage and a full disk."""

import errno
import json
import os
import pickle
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_blip.data import disk_cache
from lora_blip.data.disk_cache import Store, image_digest
from lora_blip.errors import ImageError

PLENTY = 10**9
KEY = "ab" + "0" * 30
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]


def value_of(seed: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, 256, shape or (40, 50, 3), generator=torch.Generator().manual_seed(seed)).to(dtype)


def key_of(number: int) -> str:
    return f"{number % 256:02x}{number:030x}"


def file_of(cache: Store, key: str = KEY) -> Path:
    return cache.values / key[:2] / f"{key}.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache", {"stage": "pixels", "size": [40, 50]}, PLENTY)
    assert store.put(KEY, value_of(1))
    return store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (577, 16), (1, 2, 3, 4)])
def test_get_returns_the_value_that_put_stored(tmp_path, dtype, shape):
    """A value of each dtype and shape is equal bit for bit, in a new Store too. Its file is a valid safetensors file."""
    cache = Store(tmp_path, {}, PLENTY)
    value = value_of(1, *shape, dtype=dtype) if shape else torch.tensor(7).to(dtype)
    assert KEY not in cache and cache.get(KEY) is None
    assert cache.put(KEY, value.T if len(shape) == 2 else value) and KEY in cache
    result = Store(tmp_path, {}, PLENTY).get(KEY)
    expected = value.T if len(shape) == 2 else value
    assert torch.equal(result, expected) and result.dtype == dtype and result.shape == expected.shape
    assert torch.equal(load_file(file_of(cache))["value"], expected)
    result.zero_()  # the caller's own
    assert torch.equal(cache.get(KEY), expected)


def test_kinds_are_separate_and_their_folders_describe_them(cache, tmp_path):
    other = Store(tmp_path / "cache", {"stage": "states", "size": [40, 50]}, PLENTY)
    again = Store(tmp_path / "cache", {"size": [40, 50], "stage": "pixels"}, PLENTY)  # in whatever order
    assert other.get(KEY) is None and torch.equal(again.get(KEY), value_of(1))
    assert json.loads((cache.values / "kind.json").read_text()) == cache.kind


@pytest.mark.parametrize("key", ["", "a", "../../etc/passwd", "AB00", "ab/cd", "ab.", "ab" + "0" * 200, "zz00"])
def test_a_key_that_is_a_path_is_an_error(cache, key):
    for act in (cache.get, cache.__contains__, lambda key: cache.put(key, value_of(1))):
        with pytest.raises(ValueError, match="is not a valid key"):
            act(key)


def test_every_changed_byte_and_every_truncation_is_detected(tmp_path):
    """A damaged value is None and its file is deleted. A header with other bytes and the same meaning gives the same value."""
    cache, value = Store(tmp_path, {}, PLENTY), value_of(1, 30, 50, 3)
    cache.put(KEY, value)
    whole, path = file_of(cache).read_bytes(), file_of(cache)
    rng = random.Random(0)
    places = [*range(0, 300), *(rng.randrange(len(whole)) for _ in range(300)), *range(len(whole) - 20, len(whole))]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        result = cache.get(KEY)
        assert result is None and not path.exists(), place
    for size in (0, 1, 7, 8, 20, 200, len(whole) - 1, len(whole) + 1, len(whole) + 4096):
        path.write_bytes((whole + bytes(4096))[:size])
        assert cache.get(KEY) is None and not path.exists(), size
    swapped = whole[:-8192] + whole[-4096:] + whole[-8192:-4096] if len(whole) > 9000 else whole[::-1]
    path.write_bytes(swapped)
    assert cache.get(KEY) is None


def test_pages_that_never_reached_the_disk_are_detected(tmp_path):
    """After a power failure, a file of the right size may contain zeros, or a page of another file."""
    cache, value = Store(tmp_path, {}, PLENTY), value_of(1, 4096 * 5 + 77)
    cache.put(KEY, value)
    whole, path = file_of(cache).read_bytes(), file_of(cache)
    start = len(whole) - len(value)
    pages = [whole[at : at + 4096] for at in range(start, len(whole), 4096)]
    for order in ([1, 0, 2, 3, 4, 5], [0, 1, 2, 2, 4, 5], [4, 1, 2, 3, 0, 5]):
        path.write_bytes(whole[:start] + b"".join(pages[number] for number in order))
        assert cache.get(KEY) is None, order
    path.write_bytes(whole[: start + 4096] + bytes(4096) + whole[start + 8192 :])
    assert cache.get(KEY) is None


HEADERS = {
    "another key": lambda path: save_file({"value": value_of(1)}, path, {"key": "cd" + KEY[2:], "sum": "00000000"}),
    "no checksum": lambda path: save_file({"value": value_of(1)}, path, {"key": KEY}),
    "another name": lambda path: save_file({"x": value_of(1)}, path, {"key": KEY, "sum": "00000000"}),
    "a pickle": lambda path: torch.save(value_of(1), path),
    "no JSON": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"{{{{{{{{" + bytes(100)),
    "a list": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"[[1,2,3]" + bytes(100)),
    "an endless header": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + bytes(100)),
    "a deep header": lambda path: path.write_bytes((4096).to_bytes(8, "little") + b"[" * 4096 + bytes(100)),
    "a negative shape": lambda path: path.write_bytes(
        (256).to_bytes(8, "little") + json.dumps({
            "__metadata__": {"key": KEY, "sum": "00000000"},
            "value": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 0]},
        }).encode().ljust(256)
    ),
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a hole of a terabyte": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**40),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_file_that_the_cache_did_not_write_is_not_a_value(cache, name):
    """No code is executed, no call blocks, and no wrong value is returned."""
    path = file_of(cache)
    path.unlink()
    HEADERS[name](path)
    assert cache.get(KEY) is None
    if name != "a folder":
        assert cache.put(KEY, value_of(2)) and torch.equal(cache.get(KEY), value_of(2))


def write_without_end(folder: Path, ready: int) -> None:
    cache = Store(folder, {"a": 1}, 10**9)
    os.write(ready, b".")
    for number in range(10**9):
        cache.put(key_of(number % 50), value_of(number % 50, 300, 300, 3))
        if number % 50 == 49:
            for path in cache.values.glob("*/*.safetensors"):
                path.unlink(missing_ok=True)


def test_a_kill_at_any_moment_leaves_only_complete_values(tmp_path):
    """Two processes write the same keys and are killed 8 times. Values are complete, and temporary files are removed later."""
    rng = random.Random(1)
    stored = 0
    for _ in range(4):
        read_end, ready = os.pipe()
        both = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    write_without_end(tmp_path, ready)
                finally:
                    os._exit(1)
            both.append(child)
        for _ in both:
            assert os.read(read_end, 1) == b"."
        time.sleep(rng.uniform(0.01, 0.15))
        for child in both:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(read_end)
        os.close(ready)
        cache = Store(tmp_path, {"a": 1}, 10**9)
        in_cache = [number for number in range(50) if key_of(number) in cache]
        stored += len(in_cache)
        for number in in_cache:
            assert torch.equal(cache.get(key_of(number)), value_of(number, 300, 300, 3)), number
    assert stored  # otherwise all processes were killed before they stored a value
    half = list(tmp_path.rglob("*.tmp"))
    for path in half:
        os.utime(path, (0, 0))  # long ago
    assert cache.put(key_of(99), value_of(1)) and not list(tmp_path.rglob("*.tmp"))


def write_all(folder: Path, first: int) -> int:
    cache = Store(folder, {"a": 1}, PLENTY)
    return sum(cache.put(key_of(n), value_of(n)) for n in [*range(first, 30), *range(first)])


def test_processes_that_write_the_same_keys_at_once_agree(tmp_path):
    with get_context("fork").Pool(2) as pool:
        assert pool.starmap(write_all, [(tmp_path, 0), (tmp_path, 15)]) == [30, 30]
    cache = Store(tmp_path, {"a": 1}, PLENTY)
    assert all(torch.equal(cache.get(key_of(n)), value_of(n)) for n in range(30))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 30 and not list(tmp_path.rglob("*.tmp"))


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill(cache: Store, first: int = 0) -> int:
    """Store values until the cache is full, and return their number."""
    return next(n for n in range(10**6) if not cache.put(key_of(first + n), value_of(n)))


def test_the_limit_holds_for_all_kinds_together(tmp_path, capsys):
    limit = 100_000
    one, two = Store(tmp_path, {"kind": 1}, limit), Store(tmp_path, {"kind": 2}, limit)
    for n in range(5):
        one.put(key_of(n), value_of(n))
    count = fill(two)
    assert count > 3 and total(tmp_path) <= limit < total(tmp_path) + 7000
    assert all(torch.equal(one.get(key_of(n)), value_of(n)) for n in range(5))  # it is open: not to be taken from
    assert two.put(KEY, value_of(1)) is False and two.put(key_of(0), value_of(0)) is True  # it is there already
    assert all(torch.equal(two.get(key_of(n)), value_of(n)) for n in range(count))  # what is there stays, and is read
    output = capsys.readouterr().out
    assert output.count("reached its limit of") == 1 and str(tmp_path) in output


def test_kinds_that_no_process_has_open_are_removed_the_longest_unused_first(tmp_path):
    limit = 60_000
    for number in range(3):
        old = Store(tmp_path, {"kind": number}, limit)
        assert old.put(key_of(0), value_of(0)) and old.put(key_of(1), value_of(1))
        os.utime(old.values / "kind.json", (number + 1, number + 1))
        del old
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "kind.json").write_text("a user's own")
    again = Store(tmp_path, {"kind": 0}, limit)  # the oldest, and now the newest
    assert again.get(key_of(0)) is not None
    del again
    new = Store(tmp_path, {"kind": 9}, limit)
    for n in range(5):
        assert new.put(key_of(n), value_of(n))
    left = {json.loads(p.read_text()).get("kind") for p in tmp_path.glob("*/kind.json") if p.parent != foreign}
    assert left == {0, 2, 9} and foreign.exists()
    fill(new, 100)
    left = {json.loads(p.read_text()).get("kind") for p in tmp_path.glob("*/kind.json") if p.parent != foreign}
    assert left == {9} and total(tmp_path) - 12 <= limit


def test_a_kind_is_removed_under_its_lock_and_interrupted_removals_are_completed(tmp_path, monkeypatch):
    """No process can open it meanwhile. If another process has removed it before, the cache still accepts values."""
    limit, real, tried = 60_000, disk_cache.remove, []

    def remove(kind: Path) -> None:
        if kind.name.startswith("."):
            return real(kind)
        with (kind / "kind.json").open("rb") as file:
            tried.append(disk_cache._flock(file, exclusive=True))
        real(kind)  # another process
        return real(kind)

    for number in (1, 2):
        old = Store(tmp_path, {"kind": number}, limit)
        fill_to(old, 3)
        del old
    dead, fresh, foreign = (
        tmp_path / f".{'a' * 16}.1.00000000.tmp",
        tmp_path / f".{'b' * 16}.1.00000000.tmp",
        tmp_path / ".my.tmp",
    )
    for folder in (dead, fresh, foreign):
        folder.mkdir()
        (folder / "x").write_bytes(bytes(1000))
    for folder in (dead, foreign):
        os.utime(folder, (1, 1))
    monkeypatch.setattr(disk_cache, "remove", remove)
    new = Store(tmp_path, {"kind": 9}, limit)
    assert fill(new, 100) >= 6 and len(tried) == 2 and not any(tried)
    assert not dead.exists() and fresh.exists() and foreign.exists()


def fill_to(cache: Store, count: int) -> None:
    assert all(cache.put(key_of(n), value_of(n)) for n in range(count))


def test_bytes_written_by_other_processes_count(tmp_path):
    """Two processes fill one kind. Each knows only its own writes between two counts, but both stay near the limit."""
    limit = 600_000
    pair = [Store(tmp_path, {"kind": 1}, limit) for _ in range(2)]
    for n in range(1000):
        pair[n % 2].put(key_of(n), value_of(n))
    assert limit * 0.9 < total(tmp_path) < limit * 1.05


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_is_reported_once_and_is_no_error(cache, monkeypatch, capsys, number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk_cache, "write_whole", fails)
    assert [cache.put(key_of(n), value_of(n)) for n in range(3)] == [False] * 3
    assert capsys.readouterr().out.count("nothing more is cached") == 1
    assert torch.equal(cache.get(KEY), value_of(1))


def test_a_folder_that_cannot_be_created_is_reported_once_and_is_no_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    nowhere = Store(tmp_path / "file" / "cache", {}, PLENTY)
    assert [nowhere.put(key_of(n), value_of(n)) for n in range(3)] == [False] * 3 and nowhere.get(key_of(1)) is None
    assert capsys.readouterr().out.count("nothing more is cached") == 1


def test_no_folder_is_created_before_the_first_value_is_stored(tmp_path):
    empty = Store(tmp_path / "cache", {}, PLENTY)
    assert empty.get(KEY) is None and KEY not in empty and not (tmp_path / "cache").exists()
    assert empty.put(KEY, value_of(1)) and (empty.values / "kind.json").exists()


def test_a_value_that_cannot_be_cached_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(disk_cache, "LARGEST", 1000)
    for value in (torch.empty(0), torch.zeros(3, dtype=torch.complex64), torch.zeros(1001, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="cannot be cached"):
            cache.put(key_of(1), value)


def test_a_pickled_store_is_the_same_store(cache, tmp_path):
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.get(KEY), value_of(1)) and again.put(key_of(3), value_of(3)) and key_of(3) in cache
    del cache
    other = Store(tmp_path / "cache", {"kind": "other"}, 20_000)  # 12 KB are there
    assert not other.put(key_of(1), value_of(1, 10_000)) and again.get(KEY) is not None  # still in use


def test_a_digest_is_of_the_bytes_and_is_computed_once(tmp_path, monkeypatch):
    one, two = tmp_path / "a.png", tmp_path / "b.png"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    assert image_digest(one) == image_digest(two) and len(image_digest(one)) == 32
    opened = []
    plain = disk_cache.open_regular
    monkeypatch.setattr(disk_cache, "open_regular", lambda *given: opened.append(given) or plain(*given))
    image_digest(one)
    assert not opened
    one.write_bytes(b"emas")
    os.utime(one, ns=(1, 1))
    assert image_digest(one) != image_digest(two) and len(opened) == 1


def test_an_image_that_is_not_there_has_no_digest(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, read_end in (("gone.png", "does not exist"), ("empty.png", "is empty"), ("folder.png", "a folder")):
        with pytest.raises(ImageError, match=read_end):
            image_digest(tmp_path / name)
