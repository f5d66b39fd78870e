#!/usr/bin/env bash
# torchrun --max-restarts starts all workers again when one has failed. With the gloo backend the workers of the second
# start cannot connect: the store that torchrun shares between starts still holds the addresses of the dead ones, and
# init_process_group raises. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each
# start makes a store of its own, and the second start works.
# Seen with torch 2.13.0, numpy 2.4.6, Python 3.11, Linux, two processes on one machine, 2026-11-28:
#     shared store: the second start fails
#     own store: the second start works
# The way out: set that variable before torchrun, or use a backend that does not keep addresses in the store.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
cat > worker.py <<'PYTHON'
import datetime
import os
import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 2
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(1)  # the first start fails after it has connected
open("second_start_worked", "w").close()
PYTHON
try() {
    rm -f second_start_worked
    "$place/venv/bin/torchrun" --nproc_per_node 2 --max_restarts 1 worker.py > "$1.log" 2>&1 || true
    test -e second_start_worked
}
if try shared; then echo "the behaviour has changed"; exit 1; fi
echo "shared store: the second start fails"
if ! TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 try own; then echo "the behaviour has changed"; exit 1; fi
echo "own store: the second start works"
