"""Write the preference data that `orpo demo` ships: politeness pairs, and HH-RLHF harmless transcripts.

Rows that share a prompt or an answer, compared as lower-case words, form one group, and no group is divided:
no prompt and no answer of a held-out split occurs in training. The order is that of a hash, so that the split
depends on the rows alone. The politeness rows come from a public file (README.md). The harmless rows are the
1177 that ship already: which rows of the published file they are is recorded nowhere else.

    python scripts/make_demo_data.py --sources sources
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import sources

DEMO_DATA = Path(__file__).parents[1] / "src/orpo/demo/data"
Row = dict[str, str]
SHARES = {"test": 0.2, "validation": 0.1}
FIRST_HUMAN_TURN = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|\Z)", re.DOTALL)


def normalised(text: str) -> str:
    """Lower-case words; the stripped text itself where there are none (signs, other scripts)."""
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def politeness_rows(data: bytes) -> list[Row]:
    """Instruction and input joined as `prompt`; the original answer, `output`, is left out."""
    rows = []
    for row in json.loads(data):
        prompt = "\n\n".join(part.strip() for part in (row["instruction"], row["input"]) if part.strip())
        rows.append({"prompt": prompt, "chosen": row["chosen"].strip(), "rejected": row["rejected"].strip()})
    return rows


def politeness_keys(row: Row) -> list[str]:
    """What may not be shared between splits: the prompt, either answer."""
    answers = (normalised(row[side]) for side in ("chosen", "rejected"))
    return ["prompt " + normalised(row["prompt"]), *("answer " + answer for answer in answers)]


def harmless_rows(folder: Path) -> list[Row]:
    """The rows of every split in `folder`. Splitting them anew gives the same splits: groups stay whole."""
    texts = [gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.glob("*.jsonl.gz"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def harmless_keys(row: Row) -> list[str]:
    """The opening question (transcripts of one conversation share it) and either last answer."""
    keys = []
    for side in ("chosen", "rejected"):
        opening = FIRST_HUMAN_TURN.match(row[side])
        keys.append("prompt " + normalised(opening.group(1) if opening else row[side]))
        keys.append("answer " + normalised(row[side].rpartition("\n\nAssistant:")[2]))
    return keys


def usable(rows: list[Row], counts: Counter[str]) -> list[Row]:
    """Without empty or identical sides and without repeated rows; counts what was dropped."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if not (row["chosen"].strip() and row["rejected"].strip()):
            counts["empty side"] += 1
        elif row["chosen"].strip() == row["rejected"].strip():
            counts["identical sides"] += 1
        elif tuple(row.values()) in kept:
            counts["repeated row"] += 1
        else:
            kept[tuple(row.values())] = row
    return list(kept.values())


def groups(rows: list[Row], keys: Callable[[Row], list[str]]) -> list[list[Row]]:
    """Connected components of rows under shared keys, ordered by a hash of their smallest key."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for row in rows:
        first, *rest = keys(row)
        for key in rest:
            low, high = sorted((root(first), root(key)))
            parent[high] = low
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(root(keys(row)[0]), []).append(row)
    return [members[k] for k in sorted(members, key=lambda k: hashlib.sha256(k.encode()).hexdigest())]


def split(rows: list[Row], keys: Callable[[Row], list[str]]) -> dict[str, list[Row]]:
    """Whole groups to test, then validation, until each has its share; the rest to train."""
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for group in groups(rows, keys):
        open_parts = [n for n, share in SHARES.items() if len(parts[n]) + len(group) <= share * len(rows)]
        parts[open_parts[0] if open_parts else "train"] += group
    return parts


def write(folder: Path, parts: dict[str, list[Row]], compress: bool) -> None:
    """One JSON object a line; gzip without name or time, so that the same rows give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if compress:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / f"{name}.jsonl").write_bytes(data)


def main() -> None:
    """Both sets, and the counts on screen; the licences next to them are not touched."""
    parser = sources.Parser("Write the demo's preference data.")
    parser.add_argument("--out", type=Path, default=DEMO_DATA)
    args = parser.parse_args()
    (politeness,) = parser.read_sources(args.sources, "preference/").values()
    sets = {
        "politeness": (politeness_rows(politeness), politeness_keys),
        "harmless": (harmless_rows(DEMO_DATA / "harmless"), harmless_keys),
    }
    for name, (rows, keys) in sets.items():
        counts: Counter[str] = Counter()
        parts = split(usable(rows, counts), keys)
        write(args.out / name, parts, compress=name == "harmless")
        sizes = {part: len(part_rows) for part, part_rows in parts.items()}
        print(f"{name}: {len(rows)} rows, dropped {dict(counts)}, {sizes}")


if __name__ == "__main__":
    main()
