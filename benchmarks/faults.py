"""Faults on purpose: kills, signals, full disks, damaged files, hostile input; all counted.

    python3 benchmarks/faults.py                    # everything, about an hour
    python3 benchmarks/faults.py kills disks        # some families
    python3 benchmarks/faults.py --short            # a few faults of each
    python3 benchmarks/faults.py --table            # of benchmarks/results/faults.json
    python3 benchmarks/faults.py --reproduce config:17         # one hostile input, its traceback

Exit code 1 if any fault was not survived.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from fault_families import corruption, fuzz, kills, ray_cluster

from algpt2.system.console import markdown_table

RESULTS = Path(__file__).parent / "results" / "faults.json"
FAMILIES: dict[str, Callable[[bool, int], Iterable[dict]]] = {
    **{name: partial(kills.run, name=name) for name in kills.FAMILIES},
    "corruption": corruption.run,
    "fuzz": fuzz.run,
    "ray": ray_cluster.run,
}


def markdown(results: dict[str, list[dict]]) -> str:
    """The table of RELIABILITY.md."""
    lines = [
        [row["family"], row["what"], *(f"{row[name]:,}" for name in COUNTS), row["note"]]
        for rows in results.values()
        for row in rows
    ]
    return markdown_table([["fault", "what", *COUNTS, ""], *lines])


COUNTS = ["injected", "survived", "lost"]


def main() -> int:
    """Run the families that were named; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], help="default: all")
    parser.add_argument("--short", action="store_true", help="a few of each; nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the kept results")
    parser.add_argument("--reproduce", metavar="READER:N", help="read one input of fuzz")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.table:
        print(markdown(kept))
        return 0
    if options.reproduce:
        fuzz.reproduce(options.reproduce, options.seed)
        return 0
    found: dict[str, list[dict]] = {}
    for name in options.families or FAMILIES:
        found[name] = []
        for row in FAMILIES[name](options.short, options.seed):
            found[name].append(row)
            print(json.dumps(row), flush=True)
        if not options.short:  # family by family: they take an hour
            kept |= {family: rows for family, rows in found.items() if rows}
            kept = {family: kept[family] for family in FAMILIES if family in kept}
            RESULTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(markdown(found))
    return int(any(row["lost"] for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
