"""Which causal families of the installed transformers train exactly, and how: writes docs/exactness.md.

Every family is built tiny and random (tests/tiny_families.py), in float32 and in bfloat16, plain and with the
default LoRA. Loss and every gradient are compared with those of each response alone through a plain copy. It
resumes where it stopped (exactness.json); `--only NAME ...` runs some families again, `--table` only writes.

    python benchmarks/exactness.py
"""

import argparse
import contextlib
import copy
import json
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import reference  # noqa: E402
import tiny_families  # noqa: E402

from orpo.engine.adapters import add_adapter, lora_config  # noqa: E402
from orpo.engine.model import prepare_model  # noqa: E402
from orpo.engine.packing import pack  # noqa: E402
from orpo.errors import OrpoError  # noqa: E402
from orpo.pairs import TokenizedPair  # noqa: E402
from orpo.settings.config import Objective, OrpoSettings  # noqa: E402

RESULTS = Path(__file__).with_name("exactness.json")
TABLE = ROOT / "docs" / "exactness.md"
OBJECTIVE = Objective(preference_weight=0.7)
CASES = {
    f"{name}{', LoRA' if lora else ''}": (dtype, lora)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for lora in (False, True)
}
NOT_TEXT = {
    "gemma3n": "needs timm for its image tower",
    "gemma4_assistant": "needs the states of another model",
    "gemma4_unified_assistant": "needs the states of another model",
    "musicgen": "writes audio codes, no text",
    "musicgen_melody": "writes audio codes, no text",
}
"""Families that cannot be built as a model of text alone, and why."""
SECONDS = 300
"""CPU time that a family has for a case; towers of full size need more."""
MOST_WEIGHTS = 20_000_000
"""A tiny configuration with more has a part that nobody made tiny."""
SLACK = {torch.float32: (2e-5, 2e-3), torch.bfloat16: (2e-2, 5e-2)}
"""How much larger the relative errors of loss and whole gradient may be than those of the plain model in the
same precision, both against the plain model in float32."""


def pairs() -> list[TokenizedPair]:
    """Pairs of unlike lengths; two of one prompt and answer, one that begins like these."""
    draw = torch.Generator().manual_seed(0)
    lengths = [(7, 9, 4), (3, 5, 12), (11, 2, 6), (1, 1, 3)]
    ids = [[torch.randint(1, 97, (n,), generator=draw).tolist() for n in row] for row in lengths]
    apart = [TokenizedPair(*row) for row in ids]
    prompt, best, worse = ids[0]
    ranked = [TokenizedPair(prompt, best, [5, 6]), TokenizedPair(prompt, worse, [5, 6])]
    return [*apart, apart[0], *ranked, TokenizedPair([*prompt[:5], 8], [9, 7], [6])]


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """The gradient of every trained weight, as one vector."""
    return torch.cat([gradient.flatten().float() for gradient in reference.gradients(model).values()])


def run_case(family: str, dtype: torch.dtype, lora: bool) -> str:
    """The outcome of one family in one precision, as the table shows it."""
    if family in NOT_TEXT:
        return f"not built: {NOT_TEXT[family]}"
    try:
        if (size := tiny_families.num_weights(family)) > MOST_WEIGHTS:
            return f"not built: {size:,} weights"
        model = tiny_families.build(family)
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3, 4]]))
    except Exception as error:
        return f"not built: {type(error).__name__}"
    model = model.to(dtype)
    try:
        if lora:
            model = add_adapter(model, lora_config(OrpoSettings(lora_r=2))).eval()  # as the plain twin is
        own, plain = copy.deepcopy(model), copy.deepcopy(model).float()  # own: what rounding costs
        prepared = prepare_model(model)
    except OrpoError as error:
        return f"refused: {error}"
    share_from = None if prepared.share_from is None else 1
    output = model(batch=pack(pairs(), OBJECTIVE, layout=prepared.layout, share_from=share_from)).loss
    output.backward()
    losses, gradients = [output.item()], [flat_gradient(model)]
    for twin in (own, plain):
        loss = reference.orpo_loss(reference.logprobs_of(twin), pairs(), OBJECTIVE)
        loss.backward()
        losses.append(loss.item())
        gradients.append(flat_gradient(twin))
    loss_error, own_loss_error = (abs(loss / losses[2] - 1) for loss in losses[:2])
    size = gradients[2].norm()
    gradient_error, own_error = (((g - gradients[2]).norm() / size).item() for g in gradients[:2])
    slack = SLACK[dtype]
    good = loss_error <= own_loss_error + slack[0] and gradient_error <= 1.1 * own_error + slack[1]
    how = "shares" if prepared.layout == "shared" else f"falls back to {prepared.layout}"
    return how if good else f"WRONG ({how}): loss off {loss_error:.1e}, gradient {gradient_error:.1e}"


def measure(families: list[str], results: dict[str, dict[str, str]], again: bool) -> None:
    """Run every case of these families that has no result yet."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, stop)
    for family in families:
        done = {} if again else results.setdefault(family, {})
        results[family] = done
        for name, (dtype, lora) in CASES.items():
            if name in done:
                continue
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                done[name] = run_case(family, dtype, lora)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                done[name] = f"error: {type(error).__name__}: {str(error).splitlines()[:1]}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if done[name].startswith("not built") or "TimeoutError" in done[name]:
                done |= dict.fromkeys(CASES, done[name])
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(family, done, flush=True)


def write_table(results: dict[str, dict[str, str]]) -> None:
    """Write docs/exactness.md."""
    lines = [
        "# Which model families train exactly",
        "",
        "Every causal family of transformers, tiny and random, compared with each response alone through the",
        "plain model: loss and every gradient. Written by `python benchmarks/exactness.py`, with",
        f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}, on a CPU.",
        "`shares` stores once what pairs have in common; `falls back` is exact too, slower, and said at the",
        "start; `not built` says why no tiny model of text alone could be run, nothing more.",
        "",
    ]
    for name in CASES:
        said = [row[name] for row in results.values() if name in row]
        kinds = Counter(text.partition(":")[0].partition(" (")[0] for text in said)
        lines.append(f"- {name}: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    left = sorted(set(tiny_families.FAMILIES) - set(results))
    if left:
        lines += ["", f"Not run yet: {len(left)} families. The command goes on where it stopped."]
    lines += ["", f"| family | {' | '.join(CASES)} |", f"|---{'|---' * len(CASES)}|"]
    for family, row in sorted(results.items()):
        cells = (row.get(name, "-").replace("|", "/").replace("\n", " ") for name in CASES)
        lines.append(f"| {family} | {' | '.join(cells)} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure what is left, then write."""
    parser = argparse.ArgumentParser(description="Which model families train exactly")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="run these, again where they ran")
    parser.add_argument("--table", action="store_true", help="write the table from what has run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.table:
        with contextlib.suppress(KeyboardInterrupt):
            measure(options.only or tiny_families.FAMILIES, results, again=bool(options.only))
    write_table(results)


if __name__ == "__main__":
    main()
