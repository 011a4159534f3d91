"""A worker whose reranker is a puppet: the real main, wire and sandbox around a model that obeys the query.

The query's text is a command: `sleep SECONDS`, `too-long`, `whole`, `fail`, `raise`, `nan`, `uid`, `open PATH`; anything
else scores candidates by the length of their text. `--model` is how it starts: `puppet`, `missing`, `silent`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from models import CandidateTooLong, Job, JobTooLong, ModelCard, ModelFailed, ModelNotFound, Reranker, Scores
from service.fleet.worker import run


class Puppet:
    """Scores by command."""

    card = ModelCard("puppet", "sha256:0", 0, "none", "cpu", "none", 100)

    def score(self, job: Job) -> Scores:
        command, _, argument = (job.query.text or "").partition(" ")
        margins = tuple(float(len(item.text or "")) for item in job.candidates)
        if command == "sleep":
            time.sleep(float(argument))
        elif command == "too-long":
            raise JobTooLong("the query has 101 tokens, more than 100")
        elif command == "whole" and not job.truncate:
            raise CandidateTooLong(job.candidates[-1], 7)
        elif command == "fail":
            raise ModelFailed
        elif command == "raise":
            raise RuntimeError(f"secret text: {argument}")
        elif command == "nan":
            margins = (float("nan"),) * len(margins)
        elif command == "uid":
            margins = (float(os.getuid()), float(os.getgid()), float(len(os.getgroups())))
        elif command == "open":
            margins = (float(_can_read(argument)),)
        pixels = sum(item.image.width * item.image.height for item in job.candidates if item.image)
        return Scores(
            margins, input_tokens=1, image_tokens=pixels, computed_tokens=1, stages_ms={"forward": 0.5}
        )


def _can_read(path: str) -> bool:
    try:
        return bool(Path(path).read_bytes())
    except PermissionError:
        return False


def _load(options: argparse.Namespace) -> Reranker:
    if options.model == "missing":
        raise ModelNotFound("no model called missing")
    if options.model == "silent":
        time.sleep(60)
    return Puppet()


if __name__ == "__main__":
    run(sys.argv[1:], _load)
