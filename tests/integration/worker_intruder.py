"""A worker that was taken over: the real main and the real lock around a puppet that does what `intruder.py` can do.

The query `act NAME` makes it do that act. The scores are the error's number that the kernel answered, 0 where it was done.
As the model `puppet-cuda` it says that it is on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from models import Reranker, Scores
from service.fleet.worker import run
from tests.integration import intruder
from tests.integration.fake_worker import Puppet, Running


class Intruder(Puppet):
    def _obey(self, running: Running) -> Scores:
        command, _, name = (running.job.query.text or "").partition(" ")
        if command != "act":
            return super()._obey(running)
        margins = (float(intruder.attempt(name)),) * len(running.job.candidates)
        return Scores(margins, input_tokens=1, image_tokens=0, computed_tokens=1)


def _load(options: argparse.Namespace) -> Reranker:
    intruder.WIRE, intruder.GATEWAY = options.fd, options.parent
    puppet = Intruder()
    if options.model == "puppet-cuda":
        puppet.card = replace(Puppet.card, device="cuda:0")
    return puppet


if __name__ == "__main__":
    run(sys.argv[1:], _load)
