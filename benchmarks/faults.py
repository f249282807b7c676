"""Faults on purpose: kills, signals, full disks, damaged files, hostile input; all counted.

    python3 benchmarks/faults.py                    # everything, about an hour
    python3 benchmarks/faults.py kills disks        # some families
    python3 benchmarks/faults.py --short            # a few faults of each
    python3 benchmarks/faults.py --table            # of benchmarks/results/faults.json

Exit code 1 if any fault was not survived.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import fault_corruption
import fault_fuzz
import fault_kills
import ray_cluster

RESULTS = Path(__file__).parent / "results" / "faults.json"
FAMILIES: dict[str, Callable[[bool, int], Iterable[dict]]] = {
    **{name: partial(fault_kills.run, only=name) for name in fault_kills.FAMILIES},
    "corruption": fault_corruption.run,
    "fuzz": fault_fuzz.run,
    "ray": ray_cluster.run,
}


def markdown(results: dict[str, list[dict]]) -> str:
    """The table of RELIABILITY.md."""
    lines = ["| fault | what | injected | survived | lost | |", "|---|---|---|---|---|---|"]
    for rows in results.values():
        for row in rows:
            counts = " | ".join(f"{row[name]:,}" for name in ("injected", "survived", "lost"))
            lines.append(f"| {row['family']} | {row['what']} | {counts} | {row['note']} |")
    return "\n".join(lines)


def main() -> int:
    """Run the families that were named; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], help="default: all")
    parser.add_argument("--short", action="store_true", help="a few of each; nothing is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the kept results")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.table:
        print(markdown(kept))
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
