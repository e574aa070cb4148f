"""PyTorch's threads in a process that was forked from one that imported us."""

import os
import sys

import torch

_imported_in = os.getpid()
_loaded_in = 0  # the process of the last call; 0: there was none


def restart_thread_pool() -> None:
    """Make PyTorch's threads usable in a forked process. Call this before a model is loaded or used.

    After a fork, the first operation creates PyTorch's pool, without a lock. transformers reads weights in several threads, and
    the first operations of two threads at the same time may fail ("Invalid thread pool", ATen/ParallelOpenMP.cpp). This happens
    in servers that import everything and then fork their workers (gunicorn's `preload_app`). So the pool is created here.

    If the parent has loaded a model, it may have started the threads of OpenMP. They do not exist in the child, and an
    operation that needs them waits forever. So the child uses one thread, as a worker of `torch.utils.data.DataLoader` does.
    """
    global _loaded_in
    process = os.getpid()
    if process not in (_imported_in, _loaded_in):
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if _loaded_in else threads)
        if _loaded_in and threads > 1:
            print(
                "note: this process was forked from one that had loaded a model, so PyTorch uses one thread here; for more, "
                "start it by multiprocessing.get_context('spawn')",
                file=sys.stderr,
                flush=True,
            )
    _loaded_in = process
