"""What a worker is started with: a user of its own, and the weights that it may share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import pytest

from models import ANYONE, Trust
from service.errors import ModelUnavailable, Overloaded
from service.fleet.messages import OWNING
from service.fleet.starts import Starts, worker_launch
from service.fleet.trusting import REFUSED, add_arguments, read_trust
from service.processes.children import ChildLost, Launch


def launch_on(device: str, trust: Trust = ANYONE) -> Launch:
    return worker_launch(
        worker="a.worker",
        model="m",
        device=device,
        dtype="auto",
        threads=1,
        offline=True,
        start_s=1.0,
        silence_s=1.0,
        told=print,
        trust=trust,
    )


@pytest.fixture
def starts() -> Iterator[Starts]:
    made = Starts(launch_on("cuda"), first_uid=None)
    made.share()
    yield made
    made.unshare()


def given(argv: tuple[str, ...]) -> tuple[str, ...]:
    """What a launch has beyond that of every worker."""
    return argv[argv.index("--threads") + 2 :]


def test_a_worker_shares_what_is_offered_or_else_sealed_weights_or_has_its_own(starts: Starts) -> None:
    offered, sealed, own = starts.begin(offer=7), starts.begin(), starts.begin(share=False)
    assert (given(offered.argv), offered.shared) == (("--offer", "7"), 7)
    assert sealed.shared is not None and given(sealed.argv) == ("--shared", str(sealed.shared))
    assert (given(own.argv), own.shared) == (("--own-weights",), None)
    assert starts.begin(share=False, offer=7).shared is None


def test_an_owner_is_started_like_a_worker_but_for_its_module(starts: Starts) -> None:
    worker, owner = starts.begin(offer=7), starts.begin_owner("an.owner", 7, OWNING)
    assert owner.argv == tuple("an.owner" if each == "a.worker" else each for each in worker.argv)
    assert (owner.vocabulary, owner.environ, owner.shared) == (OWNING, worker.environ, 7)


def test_failed_owners_and_workers_put_off_the_next_start_alike(starts: Starts) -> None:
    assert starts.due(1e9, 1) == 1
    starts.failed_owner("no room")
    assert starts.reason == "the weights cannot be lent: no room"
    assert starts.due(0.0, 1) == 0
    starts.begin()
    starts.failed(ChildLost("no luck"))
    assert starts.hopeless
    assert starts.reason == "a worker cannot be started: no luck"
    assert isinstance(starts.excuse(0.0), Overloaded)


def test_a_refused_model_is_told_at_once_and_forgotten_once_a_worker_came_up(starts: Starts) -> None:
    starts.begin()
    starts.failed(
        ChildLost("exit status 6", status=REFUSED, last_words="ModelRefused: a.json is not what was signed")
    )
    told = starts.hopeless, starts.refusal, type(starts.excuse(0.0))
    assert told == (True, "a.json is not what was signed", ModelUnavailable)
    starts.begin()
    starts.failed(ChildLost("exit status 4", status=4, last_words="ModelFailed: no memory"))
    assert (starts.refusal, type(starts.excuse(0.0))) == (None, Overloaded)
    starts.begin()
    starts.succeeded(None)
    assert not starts.hopeless


def test_a_worker_is_told_whose_model_it_may_load_and_the_key_is_no_argument(starts: Starts) -> None:
    trust = Trust(b"public", "/keys/model.sig", bytes(range(32)))
    launch = launch_on("cpu", trust)
    assert launch.secret == trust.seal_key
    assert str(trust.seal_key) not in repr(launch) + repr(trust)
    assert given(launch.argv) == (
        "--signer",
        "cHVibGlj",
        "--signature",
        "/keys/model.sig",
        "--seal-key",
        "{secret}",
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out, into = os.pipe()
    os.write(into, trust.seal_key)
    os.close(into)
    argv = [str(out) if each == "{secret}" else each for each in given(launch.argv)]
    assert read_trust(parser.parse_args(argv)) == trust
