"""A base is read from disk, also in a forked process."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lora_blip.errors import ModelError
from lora_blip.models import loading
from lora_blip.models.precision import pick_device

FORKS = 16  # without a new pool, three of eight of them fail


class ReadInThreads:
    """A model class whose weights are read in several threads, as transformers does."""

    @staticmethod
    def from_pretrained(*_: object, **__: object) -> tuple[None, dict[str, list[str]]]:
        errors: list[Exception] = []
        start = False
        tensor = torch.ones(200_000)

        def read() -> None:
            while not start:  # an Event would start the threads one after the other
                pass
            try:
                tensor.add(1)
            except RuntimeError as error:
                errors.append(error)

        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        start = True
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return None, {"missing_keys": [], "unexpected_keys": []}


def load_in_forked_processes() -> None:
    """Fork FORKS times, and load a base in each child. Raise AssertionError if a child fails."""
    torch.set_num_threads(1)
    torch.ones(200_000)  # it creates PyTorch's pool, but no thread; a child would wait forever for a thread of OpenMP
    torch.set_num_threads(2)
    for _ in range(FORKS):
        child = os.fork()
        if not child:
            try:
                loading._load_model(ReadInThreads, "a base", "a base", None, torch.float32)  # type: ignore[arg-type]
            except BaseException as error:
                os.write(2, f"{error}\n".encode())
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.loads
def test_a_base_loads_in_a_process_that_was_forked_after_torch_was_imported():
    """Before, it failed ("Invalid thread pool"). The parent is a new process, because other tests start threads."""
    code = "from tests.models.test_loading import load_in_forked_processes; load_in_forked_processes()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=240)


def test_an_unknown_device_names_the_devices_that_are_used():
    """torch's own message lists more than twenty types."""
    with pytest.raises(ModelError) as error:
        pick_device("gpu")
    assert "device 'gpu' cannot be used here (expected cpu, cuda, cuda:1, mps or auto)" in str(error.value)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_mps_without_an_apple_gpu_has_a_short_message():
    """torch's own message lists more than fifty backends."""
    with pytest.raises(ModelError) as error:
        pick_device("mps")
    assert str(error.value).startswith("device 'mps' cannot be used here (PyTorch finds no Apple GPU); set DEVICE")
