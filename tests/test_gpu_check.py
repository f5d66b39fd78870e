"""The GPU check runs as it stands: its cells on a CPU, at sizes that mean nothing."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from test_varlen import torch_2_12

from orpo.engine.varlen import VarlenKernel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
gpu_check = pytest.importorskip("gpu_check", reason="the benchmarks are not there")
gpu_steps = pytest.importorskip("gpu_steps")

SIZE = gpu_steps.sizes(smoke=True)


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--smoke", "--out", str(folder), *arguments])
    gpu_check.main()
    return json.loads((folder / "gpu.json").read_text())["cells"]


def test_head_and_model_are_exact_by_its_own_measure(monkeypatch, tmp_path):
    cells = run(monkeypatch, tmp_path, "--parts", "exactness", "--models", "7B", "--only", "^(head|model)")
    assert len(cells) == 3
    assert all(cell.get("exact", cell.get("fused", {}).get("exact")) for cell in cells.values())
    assert "| " not in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("layer", ["14/2 heads of 64", "8/4 heads of 256, softcap 50"])
def test_an_attention_cell_times_what_serves_and_says_why_the_kernel_does_not(layer):
    cell = gpu_check.attention_cell(layer, torch.bfloat16, SIZE)
    assert cell["segments"]["exact"] and len(cell["segments"]["errors"]) == 4
    assert ("softcap" if "softcap" in layer else "CUDA") in cell["kernel"]["refuses"]


def test_an_attention_cell_compares_the_kernel_with_segments(monkeypatch):
    monkeypatch.setattr(gpu_check, "KERNEL", VarlenKernel(torch_2_12, anywhere=True))
    cell = gpu_check.attention_cell("32/8 heads of 128, window 128", torch.bfloat16, SIZE)
    assert cell["kernel"]["exact"] and len(cell["kernel"]["errors"]) == 4


def test_a_cell_that_fails_is_recorded_and_run_again(tmp_path):
    report = gpu_check.Report(tmp_path, "", time.monotonic() + 60)
    outcomes = iter([RuntimeError("out of memory"), {"exact": True}])

    def cell():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    for _ in range(3):
        report.cell("a cell", cell)
        known = gpu_check.Report(tmp_path, "", 0.0).content["cells"]["a cell"]
    assert known["exact"] and "error" not in known


def test_a_step_that_fails_leaves_the_others_their_times():
    times = gpu_check.interleaved({"good": lambda: None, "bad": lambda: 1 / 0}, SIZE)
    assert times["good"]["seconds"] >= 0 and "ZeroDivisionError" in times["bad"]["error"]


def test_steps_of_ours_and_of_the_peers_have_the_same_loss():
    shape = SIZE.shapes["7B"]
    pairs = gpu_steps.make_pairs(*SIZE.data["hh"], shape.vocab)
    model = shape.build(SIZE.device)
    gpu_check.prepare_model(model, layout="shared")
    ours = model(batch=gpu_steps.pack(pairs, gpu_steps.OBJECTIVE)).loss.item()
    batch = gpu_steps.to_padded(pairs)
    assert gpu_steps.padded_loss(model, batch).item() == pytest.approx(ours, rel=1e-5)
    assert gpu_steps.trl_loss()[1](model, batch).item() == pytest.approx(ours, rel=1e-5)


def test_useful_flops_count_a_shared_prompt_once():
    shape = gpu_steps.Shape(64, 2, 4, 4, 128, 100, tied=False)
    pair = gpu_steps.TokenizedPair(list(range(50)), [1] * 10, [2] * 20)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    attended = 60 * 61 / 2 + 20 * 50 + 20 * 21 / 2
    products = 2 * weights * 80 + 2 * 64 * 100 * 79
    assert gpu_steps.useful_flops([pair], shape, frozen=False) == 3 * (products + 4 * 64 * 2 * attended)
    assert gpu_steps.useful_flops([pair], shape, frozen=True) == 2 * products + 3 * 4 * 64 * 2 * attended
