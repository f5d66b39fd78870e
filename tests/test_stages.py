"""Long reading and tokenizing show how far they are, where somebody asks; library calls are silent."""

import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from tiny_tokenizer import tiny_tokenizer

from orpo.console import LongWork
from orpo.data.dataset import tokenize_pairs
from orpo.data.forked import forked
from orpo.data.preferences import read_preferences
from orpo.data.stages import following, report

ROWS = [{"prompt": f"Q{i}", "chosen": "a", "rejected": "b"} for i in range(1300)]


def test_workers_end_although_this_process_only_notes_that_it_is_to_stop():
    """A run does that on SIGTERM, which is how a pool ends its workers, for which it then waits."""
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append("stop"))
    try:
        began = time.monotonic()
        with forked(2) as pool:
            pool.apply_async(time.sleep, (20,))
            assert pool.apply(abs, (-1,)) == 1
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # as sent to a whole job
                assert pool.apply(signal.getsignal, (number,)) == signal.SIG_IGN
            time.sleep(0.2)
        assert time.monotonic() - began < 10
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == ["stop"], "this process keeps its own handler"


@pytest.mark.parametrize("num_proc", [None, 2])
def test_reading_and_tokenizing_report_every_stage_to_its_end(num_proc, capsys):
    calls = []
    with following(lambda *what: calls.append(what)):
        pairs = read_preferences(ROWS)
        tokenize_pairs(pairs, tiny_tokenizer("chatml"), max_length=None, num_proc=num_proc)
    reading = [call[1:] for call in calls if call[0] == "reading data"]
    tokenizing = [call[1:] for call in calls if call[0] == "tokenizing"]
    assert reading == [(done, 1300) for done in (0, 256, 512, 768, 1024, 1280, 1300)]
    assert tokenizing == [(done, 1300) for done in (0, 512, 1024, 1300)]
    report("nobody follows", 1)
    tokenize_pairs(read_preferences(ROWS), tiny_tokenizer("chatml"), max_length=None, num_proc=num_proc)
    assert len(calls) == len(reading) + len(tokenizing)
    assert capsys.readouterr() == ("", "")


def test_a_file_is_read_without_a_known_number_of_rows(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\n" + "Q,a,b\n" * 300)
    calls = []
    with following(lambda *what: calls.append(what)):
        read_preferences(path)
    stage = "reading pairs.csv"
    assert calls == [(stage, 0, None), (stage, 256, None), (stage, 300, 300)]


def test_lines_come_after_a_while_and_then_seldom(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with LongWork() as work:
        for second in range(80):
            now[0] = 100.0 + second
            work("tokenizing", second * 1000, 80_000)
        work("tokenizing", 80_000, 80_000)
        now[0] += 1
        work("reading data", 0, None)
        now[0] += 4
        work("reading data", 2000, None)
    assert capsys.readouterr() == (
        "",
        "tokenizing: 3,000 of 80,000 rows, 1,000 a second, 1:17 left\n"
        "tokenizing: 33,000 of 80,000 rows, 1,000 a second, 0:47 left\n"
        "tokenizing: 63,000 of 80,000 rows, 1,000 a second, 0:17 left\n"
        "reading data: 2,000 rows, 500 a second\n",
    )


SCRIPT = """
import time
from orpo.console import LongWork
LongWork.PATIENCE = 0.0
with LongWork() as work:
    for done in (0, 500, 1000):
        work("tokenizing", done, 2000)
        time.sleep(0.2)
print("done")
"""


def test_a_bar_on_a_terminal_fits_80_columns_and_goes_away():
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=child, env=environment, check=True
    )
    os.close(child)
    shown = io.BytesIO()
    while True:
        try:
            shown.write(os.read(parent, 65536))
        except OSError:
            break
    text = shown.getvalue().decode()
    assert done.stdout == b"done\n"
    assert "tokenizing" in text and "1,000 of 2,000 rows" in text and "a second, 0:" in text
    assert text.rstrip().endswith("\x1b[2K")  # the last thing is that its line is cleared
