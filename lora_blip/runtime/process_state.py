"""A lock for code that changes, or depends on, settings of the whole process.

While transformers loads a model, it changes PyTorch's default dtype, turns `torch.nn.init` off, and does not tie weights. If
another thread loads a model or creates an adapter at the same time, weights are missing or random.
"""

import os
import threading

PROCESS_STATE = threading.RLock()
if hasattr(os, "register_at_fork"):  # a forked process inherits neither a locked lock nor changed settings
    os.register_at_fork(
        before=PROCESS_STATE.acquire, after_in_parent=PROCESS_STATE.release, after_in_child=PROCESS_STATE.release
    )
