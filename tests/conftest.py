"""One thread, no logs, and hypothesis without a database or a clock: the same run every time."""

import gc
import os
import signal

import hypothesis
import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
hypothesis.settings.register_profile(
    "repeatable", max_examples=50, derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("repeatable")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and nohup a closed terminal; a run
# respects both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Leave what is there out of garbage collection, which each training asks for: a fifth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def lazy_disk():
    """Waiting for the disk is most of a tiny checkpoint's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
