"""The whole gateway before a worker that computes nothing: what is left is what the gateway costs.

    python -m bench.echo [--worker MODULE] [--model NAME]        settings as for `python -m service serve`

The worker is a process like any other, with the same wire and sandbox; by default this module, which gives every
candidate the length of its text as its margin. Tests start it with a worker that obeys (`tests/integration/fake_worker.py`).
"""

from __future__ import annotations

import argparse
import sys

from models import Done, Job, ModelCard, Reranker, Scores, Work
from service.fleet.local import LocalFleet
from service.fleet.worker import run as run_worker
from service.installation import bring_up_to_date, opened
from service.settings import Settings


class Echo:
    """Scores at once."""

    card = ModelCard("echo", "sha256:0", 0, "none", "cpu", "none", 8192)
    compilations = 0
    work = Work()

    def score(self, job: Job) -> Scores:
        margins = tuple(len(item.text or "") / 1000 for item in job.candidates)
        return Scores(margins, input_tokens=len(margins), image_tokens=0, computed_tokens=len(margins))

    def begin(
        self,
        ticket: int,
        job: Job,
        done: Done,
        *,
        tenant: str = "",
        session: str | None = None,
        deadline_s: float | None = None,
    ) -> None:
        done(self.score(job))

    def cancel(self, ticket: int) -> None:
        pass

    def end_session(self, session: str, *, tenant: str = "") -> None:
        pass

    def forget(self, tenant: str) -> None:
        pass

    def rest(self) -> None:
        pass


def _load(_options: argparse.Namespace) -> Reranker:
    return Echo()


def serve(arguments: list[str]) -> None:
    from service.serving import run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", default="bench.echo")
    parser.add_argument("--model", default="echo")
    options = parser.parse_args(arguments)
    settings = Settings()
    with opened(settings) as installation:
        bring_up_to_date(installation)
        fleet = LocalFleet(
            model=options.model,
            worker=options.worker,
            max_workers=settings.max_workers,
            spare_workers=settings.spare_workers,
            queue_limit=settings.queue_limit,
            jobs_at_once=64,
        )
        run(settings, installation, demo=False, fleet=fleet)


if __name__ == "__main__":
    if "--fd" in sys.argv:  # as a worker, by its gateway
        run_worker(sys.argv[1:], _load)
    serve(sys.argv[1:])
