"""Limits of the system that look like other errors: threads and processes (`ulimit -u`)."""

import errno

ADVICE = (
    "the system allows no more threads or processes (ulimit -u). Raise the limit, end other programs, or use fewer: "
    "NUM_WORKERS = 0 (--num-workers 0), and OMP_NUM_THREADS=1 in the environment"
)


def is_process_limit(error: BaseException) -> bool:
    """Return True if the system refused to start a thread or a process."""
    refused = isinstance(error, OSError) and error.errno == errno.EAGAIN
    return refused or "can't start new thread" in str(error)
