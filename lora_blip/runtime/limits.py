"""Recognize system errors with misleading messages: the limit of threads and processes (`ulimit -u`), and lost processes."""

import errno
import os
import threading

ADVICE = (
    "the system allows no more threads or processes (ulimit -u). Raise the limit, end other programs, or use fewer: "
    "NUM_WORKERS = 0 (--num-workers 0), and OMP_NUM_THREADS=1 in the environment"
)

LOST_WORKER = (
    "a process that loads images was ended by the system, which has too little memory (also in /dev/shm), or allows too few "
    "processes (ulimit -u). Use fewer: NUM_WORKERS = 0 (--num-workers 0) loads images in the main process"
)

CPU_ALLOCATOR = "DefaultCPUAllocator"  # in PyTorch's message if a CPU has too little memory
OUT_OF_MEMORY = ("out of memory", CPU_ALLOCATOR)  # in PyTorch's messages for a GPU, and for a CPU

LOST = ("Connection reset", "Connection closed", "Broken pipe", "NCCL error", "remote process exited")  # errors of a lost peer


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if PyTorch could not allocate memory on a GPU or a CPU."""
    return any(sign in str(error) for sign in OUT_OF_MEMORY)


def is_lost_peer(error: BaseException) -> bool:
    """Return True if a collective failed because another process of torchrun is gone."""
    return any(sign in str(error) for sign in LOST)


def follows_lost_peer(error: BaseException | None) -> bool:
    """Return True if torchrun started several processes, and the error was raised after a collective had lost one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    while error is not None and not is_lost_peer(error):
        error = error.__cause__ or error.__context__
    return error is not None


def is_lost_worker(error: BaseException) -> bool:
    """Return True if a worker of a DataLoader crashed or was killed."""
    return str(error).startswith("DataLoader worker (pid")


def is_process_limit(error: BaseException) -> bool:
    """Return True if the system refused to start a thread or a process."""
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return True
    return "can't start new thread" in str(error) or not can_start_a_thread()


def can_start_a_thread() -> bool:
    """Return False at the limit of threads. At this limit, libraries fail with unrelated messages."""
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        return False
    return True
