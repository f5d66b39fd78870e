"""`orpo eval RUN --data FILE`: what a model prefers on held-out pairs, with standard errors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import ConfigError

if TYPE_CHECKING:
    from orpo.data.dataset import TokenizedDataset
    from orpo.evaluation.preferences import Evaluation
    from orpo.settings.config import OrpoSettings

_SHOWN = {
    "accuracy": "preference accuracy",
    "margin": "margin",
    "log_odds_ratio": "log odds ratio",
    "chosen_logprob": "chosen log-prob",
    "rejected_logprob": "rejected log-prob",
    "nll": "NLL over examples",
    "nll_token_mean": "NLL over tokens",
    "odds_ratio_loss": "odds-ratio loss",
    "loss": "loss",
}
_FROM_RUN = (
    *("objective", "beta", "nll_weight", "odds_scale", "nll_on", "nll_reduction"),
    *("max_length", "trust_remote_code", "logits_memory_mib", "attn_implementation"),
)


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo eval` to the command line."""
    parser = words.add_parser(
        "eval",
        help="score held-out pairs: accuracy, margins, log odds, NLL",
        description="Score preference pairs with the model of a run directory, or with any model or adapter.",
        epilog="Further settings are those of a recipe: --max_length 1024, --data_format hh, ...",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN", help="run directory, model or adapter folder, or hub name")
    parser.add_argument("--data", required=True, metavar="FILE", help="local file or hub name of the pairs")
    parser.add_argument("--split", default=None, help="split of a hub data set (default: test)")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=512, help="pairs packed together")
    parser.add_argument(
        "--name", help="the result is saved as RUN/eval-NAME.json (default: name of the data)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, save."""
    from orpo.run.directory import model_folder, read_recipe
    from orpo.settings.recipe import load_recipe

    if args.batch_size < 1:
        raise ConfigError(f"--batch_size: {args.batch_size} is out of range; expected at least 1")
    typed = load_recipe(overrides=args.settings).settings
    folder = model_folder(args.model)
    known = read_recipe(Path(args.model) / "recipe.yaml")
    settings = {key: known[key] for key in _FROM_RUN if known.get(key) is not None} | typed
    result = evaluate_model(folder, args, settings)
    saved = _save(result, Path(args.model), args.name or _data_name(args.data))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print_table(result)
        if saved:
            print(f"saved as {saved}")
    return 0


def evaluate_model(folder: str, args: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any]:
    """Load model and data, score, and return the result as plain values.

    Raises:
        OrpoError: The model or the data cannot be used.
    """
    from orpo.commands.config import check_recipe
    from orpo.engine.loading import load_tokenizer
    from orpo.engine.memory import default_tokens_per_row
    from orpo.engine.model import prepare_model
    from orpo.engine.steps import RowSettings
    from orpo.evaluation.generation import load_trained
    from orpo.evaluation.preferences import evaluate
    from orpo.settings.config import OrpoSettings, resolve_objective

    check_recipe(recipe)
    fields = OrpoSettings.__dataclass_fields__
    settings = OrpoSettings(**{key: value for key, value in recipe.items() if key in fields})
    objective, _ = resolve_objective(settings)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    pairs = _read_pairs(args, settings, tokenizer)
    model = load_trained(folder, settings)
    device = next(model.parameters()).device
    prepared = prepare_model(
        model, objective, layout=settings.layout, logits_memory_mib=settings.logits_memory_mib
    )
    if not args.json:
        print(*prepared.notices, sep="\n", end="\n" if prepared.notices else "")
    budget = settings.tokens_per_row or default_tokens_per_row(model, device, trains=False)
    rows = RowSettings(objective, prepared.layout, budget)
    with _progress(len(pairs), silent=args.json) as progress:
        found = evaluate(model, pairs, rows, batch_size=args.batch_size, progress=progress)
    return _as_result(args, found, recipe, pairs)


def _read_pairs(args: argparse.Namespace, settings: OrpoSettings, tokenizer: Any) -> TokenizedDataset:
    from orpo.data.dataset import tokenize_pairs
    from orpo.data.preferences import ReadSettings, read_preferences

    reading = ReadSettings(
        split=args.split or _default_split(args.data, settings),
        config=settings.dataset_config,
        data_format=settings.data_format,
        columns=settings.columns,
        on_bad_row=settings.on_bad_row,
        sft_rows=settings.sft_rows,
    )
    read = read_preferences(args.data, max_dropped=settings.max_dropped, settings=reading)
    tokens = tokenize_pairs(
        read,
        tokenizer,
        max_length=settings.max_length,
        chat_template=settings.chat_template,
        num_proc=settings.dataset_num_proc,
        max_dropped=settings.max_dropped,
    )
    if not args.json:
        print(*read.notices, *tokens.notices, *tokens.report.lines(), sep="\n")
    return tokens


@contextmanager
def _progress(total: int, *, silent: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal that is gone when the work is done."""
    if silent or not sys.stdout.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda done: bar.update(task, completed=done)


def _as_result(
    args: argparse.Namespace, found: Evaluation, recipe: dict[str, Any], pairs: TokenizedDataset
) -> dict[str, Any]:
    return {
        "model": args.model,
        "data": args.data,
        "num_pairs": found.num_pairs,
        "num_preferences": found.num_preferences,
        "metrics": found.metrics,
        "groups": {
            name: {"num_pairs": found.group_sizes[name], "metrics": metrics}
            for name, metrics in found.groups.items()
        },
        "settings": recipe,
        "rows": pairs.report.to_dict(),
    }


def _default_split(data: str, settings: Any) -> str | None:
    """A single file is evaluated whole; elsewhere it is the recipe's test split, or `test`."""
    return None if Path(data).is_file() else settings.dataset_test_split or "test"


def _data_name(data: str) -> str:
    return Path(data).name.split(".")[0] or "data"


def _save(result: dict[str, Any], run_dir: Path, name: str) -> Path | None:
    """Save beside the model; a hub name has no place to save to."""
    if not run_dir.is_dir():
        return None
    path = run_dir / f"eval-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"all pairs": (result["num_pairs"], result["metrics"])}
    if len(result["groups"]) > 1:
        columns |= {name: (group["num_pairs"], group["metrics"]) for name, group in result["groups"].items()}
    table = Table(title=f"{result['model']} on {result['data']}", title_justify="left")
    table.add_column("")
    for name, (number, _) in columns.items():
        table.add_column(f"{name} ({number:,})", justify="right")
    for name, title in _SHOWN.items():
        if name in result["metrics"]:
            table.add_row(title, *(_value(name, metrics) for _, metrics in columns.values()))
    Console().print(table)


def _value(name: str, metrics: dict[str, float]) -> str:
    if name not in metrics:
        return ""
    value, error = metrics[name], metrics.get(f"{name}_se")
    if name == "accuracy":
        return f"{value:.1%}" + (f" ± {100 * error:.1f}" if error is not None else "")
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
