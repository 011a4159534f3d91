"""Packed scoring beside what stock transformers offers, in one process, on the same model, inputs and threads.

    packed       QwenReranker.score: one shared prefix, no padding, last rows only; a thread works on a pack of its own
    padded       stock forward over left-padded batches of sorted lengths, SDPA, `logits_to_keep=1`; the better
                 of two batch sizes
    one_by_one   stock forward over one candidate at a time, as the reference does, but with `logits_to_keep=1`

All three write the same prompts and prepare the same images within their time. Methods take turns; figures are
medians; every method's scores are compared before its time counts, and in bf16 with those of the stock model in fp32
too. Then: the share of this processor's matrix rate, what a session saves, and how cost grows with candidates.

    python bench/scoring.py [--quick] [--dtype fp32|bf16] [--model NAME] [--threads N]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from bench.report import cpu_model, git_commit
from bench.stock import CANDIDATES, Case, Stock, make_job
from models import DEMO, Item, Job, Pixels, Scores, weights
from models.qwen import QwenReranker

BATCHES = (8, 16)
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
DTYPES = tuple(TOLERANCE)
CASES = (
    Case("prefix_60", 60),
    Case("prefix_300", 300),
    Case("prefix_1000", 1000),
    Case("query_image", 100, query_image=True),
    Case("candidate_images", 100, candidate_images=16),
)
AIMS = {"prefix_60": 2.0, "prefix_300": 4.5, "prefix_1000": 8.0}
RATE_AIM, SESSION_AIM, LINEAR_AIM = 0.7, 3.0, 0.1
FULL = tuple((case, 3, BATCHES) for case in CASES)
# The smaller batches: they are the faster ones on a CPU, and the whole must end within 50 s on a busy machine.
QUICK = ((CASES[1], 3, (8,)), (CASES[3], 3, (8,)))


def take_turns(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each method; they take turns, so that a busy machine is unfair to none."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            began = time.perf_counter()
            method()
            times[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(taken) for name, taken in times.items()}


def run_case(
    case: Case, packed: QwenReranker, stock: Stock, truth: Stock, rounds: int, batches: Sequence[int]
) -> dict[str, Any]:
    """`truth` is the stock model in fp32; the same as `stock` where that is."""
    job = make_job(case, stock.prompt, seed=1)
    scores = packed.score(job)  # also the warm-up
    margins: dict[str, Sequence[float]] = {"truth": truth.score(job, 1)}

    def score(name: str, batch: int) -> Callable[[], object]:
        return lambda: margins.__setitem__(name, stock.score(job, batch))

    methods: dict[str, Callable[[], object]] = {
        "packed": lambda: packed.score(job),
        "one_by_one": score("one_by_one", 1),
    }
    methods |= {f"padded_{batch}": score(f"padded_{batch}", batch) for batch in batches}
    taken = take_turns(methods, rounds)
    best = min(batches, key=lambda batch: taken[f"padded_{batch}"])
    padded_ms = taken[f"padded_{best}"]
    margins["packed"] = scores.margins

    def delta(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(margins[one], margins[other], strict=True))

    return {
        "case": case.name,
        # The reference reads the prefix once per candidate, a job of distinct candidates computes it once.
        "prefix_tokens": (scores.input_tokens - scores.computed_tokens) // (CANDIDATES - 1),
        "reference_tokens": scores.input_tokens,
        "computed_tokens": scores.computed_tokens,
        "packed_ms": round(taken["packed"], 1),
        "padded_ms": round(padded_ms, 1),
        "padded_batch": best,
        "one_by_one_ms": round(taken["one_by_one"], 1),
        "speedup_over_padded": round(padded_ms / taken["packed"], 2),
        "speedup_over_one_by_one": round(taken["one_by_one"] / taken["packed"], 2),
        "max_abs_delta_z": delta("packed", "one_by_one"),
        "max_abs_delta_z_to_fp32": delta("packed", "truth"),
        "max_abs_delta_z_of_one_by_one_to_fp32": delta("one_by_one", "truth"),
    }


def measure_matrix_rate(model: Any, dtype: torch.dtype, threads: int, packed_tokens: int) -> float:
    """GFLOP/s of the language model's own products, nothing between them, each thread on inputs of its own."""
    layer = model.model.language_model.layers[0]
    products = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj]
    flops: int = sum(2 * packed_tokens * each.weight.numel() for each in products)
    repeats = 40
    ready = threading.Barrier(threads)

    @torch.inference_mode()
    def work(_: int) -> tuple[float, float]:
        torch.set_num_threads(1)
        inputs = [torch.randn(packed_tokens, each.in_features, dtype=dtype) for each in products]
        for each, values in zip(products, inputs, strict=True):
            each(values)
        ready.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            for each, values in zip(products, inputs, strict=True):
                each(values)
        return began, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        spans = list(pool.map(work, range(threads)))
    took_s = max(end for _, end in spans) - min(began for began, _ in spans)
    return threads * repeats * flops / took_s / 1e9


def count_flops(model: Any, job: Job, scores: Scores) -> float:
    """Multiply-adds times two of all products of one packed forward, attention included, as it must be computed.

    The last layer computes keys and values for every row, everything else for the candidates' last rows only.
    """
    language = model.model.language_model
    config = language.config
    layer = language.layers[0]
    keys = sum(each.weight.numel() for each in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    attention, mlp = layer.self_attn, layer.mlp
    others = (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    rest = sum(each.weight.numel() for each in others)
    candidates = len(job.candidates)
    prefix = (scores.input_tokens - scores.computed_tokens) // (candidates - 1)
    own = scores.computed_tokens - prefix
    layers = config.num_hidden_layers
    width = config.hidden_size
    linear = 2 * ((layers - 1) * (keys + rest) * scores.computed_tokens)
    linear += 2 * (keys * scores.computed_tokens + rest * candidates)
    # Each row attends to the prefix and to half of its own candidate, taken as if all were of the mean length.
    pairs: float = own * prefix + own * (own / candidates) / 2 + prefix * prefix / 2
    total: float = linear + 4 * width * pairs * (layers - 1)
    return total


def measure_share(packed: QwenReranker, stock: Stock, dtype: str, threads: int, case: Case) -> dict[str, Any]:
    """The forward's rate beside the matrix rate, in turns."""
    job = make_job(case, stock.prompt, seed=2)
    model, torch_dtype = packed.qwen.model, torch.bfloat16 if dtype == "bf16" else torch.float32
    scores = packed.score(job)
    flops = count_flops(model, job, scores)
    peaks, rates, walls = [], [], []
    for _ in range(7):
        peaks.append(measure_matrix_rate(model, torch_dtype, threads, 512))
        began = time.perf_counter()
        scores = packed.score(job)
        walls.append(flops / (time.perf_counter() - began) / 1e9)
        rates.append(flops / (scores.stages_ms["forward"] / 1000 / threads) / 1e9)
    peak = statistics.median(peaks)
    return {
        "case": case.name,
        "dtype": dtype,
        "matrix_gflops_per_s": round(peak, 1),
        "whole_request_gflops_per_s": round(statistics.median(walls), 1),
        "forward_gflops_per_s": round(statistics.median(rates), 1),
        "share_of_whole_request": round(statistics.median(walls) / peak, 3),
        "share": round(statistics.median(rates) / peak, 3),
    }


def measure_session(packed: QwenReranker) -> dict[str, Any]:
    """Thirty-two images of 224 x 224: the first request of a session, then another query, then the same again."""
    rng = random.Random(3)
    tickets = itertools.count(1)

    def ask(session: str, query: str, images: Sequence[Pixels]) -> float:
        answered = threading.Event()
        began = time.perf_counter()
        job = Job(Item(query), tuple(Item(None, image) for image in images))
        packed.begin(next(tickets), job, lambda _: answered.set(), session=session)
        answered.wait()
        return (time.perf_counter() - began) * 1000

    taken: dict[str, list[float]] = {"first": [], "another_query": [], "same_query": []}
    for turn in range(7):
        images = [Pixels(224, 224, rng.randbytes(224 * 224 * 3)) for _ in range(32)]
        session = f"session {turn}"
        taken["first"].append(ask(session, "a red shoe", images))
        taken["another_query"].append(ask(session, f"a cat, {turn}", images))
        taken["same_query"].append(ask(session, "a red shoe", images))
        packed.end_session(session)
    median = {name: statistics.median(each) for name, each in taken.items()}
    return {
        **{f"{name}_ms": round(each, 1) for name, each in median.items()},
        "speedup_another_query": round(median["first"] / median["another_query"], 2),
        "speedup_same_query": round(median["first"] / median["same_query"], 2),
    }


def measure_growth(packed: QwenReranker, stock: Stock, counts: Sequence[int]) -> dict[str, Any]:
    """Milliseconds by number of candidates of one length, and how far the largest is from a straight line.

    The line goes through the time of two smaller counts: what it foretells for the largest is the yardstick.
    """
    base = make_job(dataclasses.replace(CASES[0]), stock.prompt, seed=4)
    text = max((item.text or "" for item in base.candidates), key=len)
    jobs = {
        count: Job(base.query, tuple(Item(f"{index} {text}") for index in range(count))) for count in counts
    }
    packed.score(jobs[counts[0]])

    def score(job: Job) -> Callable[[], object]:
        return lambda: packed.score(job)

    taken = take_turns({str(count): score(job) for count, job in jobs.items()}, 3)
    small, middle, large = counts[0], counts[-2], counts[-1]
    slope = (taken[str(middle)] - taken[str(small)]) / (middle - small)
    foretold = taken[str(small)] + slope * (large - small)
    return {
        "milliseconds": {count: round(each, 1) for count, each in taken.items()},
        "off_the_line": round(taken[str(large)] / foretold - 1, 3),
    }


def aims_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    aims: list[dict[str, Any]] = []

    def at_least(what: str, aim: float, measured: float) -> None:
        aims.append({"what": what, "aim": f">= {aim}", "measured": measured, "ok": measured >= aim})

    def at_most(what: str, aim: float, measured: float) -> None:
        aims.append({"what": what, "aim": f"<= {aim}", "measured": measured, "ok": measured <= aim})

    for each in report["figures"]:
        name = f"{each['case']}, {each['dtype']}"
        if each["case"] in AIMS:
            at_least(f"speed over a padded batch, {name}", AIMS[each["case"]], each["speedup_over_padded"])
        at_most(
            f"largest |dz| to the stock model in fp32, {name}",
            TOLERANCE[each["dtype"]],
            each["max_abs_delta_z_to_fp32"],
        )
    for each in report["matrix_rate"]:
        at_least(f"share of the matrix rate, {each['case']}, {each['dtype']}", RATE_AIM, each["share"])
    session = report["session"]
    at_least(
        "a session's second request over the same 32 images, another query",
        SESSION_AIM,
        session["speedup_another_query"],
    )
    at_least(
        "a session's second request over the same 32 images, the same query",
        SESSION_AIM,
        session["speedup_same_query"],
    )
    at_most("off a straight line at the most candidates", LINEAR_AIM, abs(report["growth"]["off_the_line"]))
    return aims


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cases in the default dtype, within 50 s")
    parser.add_argument("--dtype", choices=DTYPES, help="of a full run: this one alone")
    parser.add_argument("--model", default=DEMO)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores of this machine"
    )
    options = parser.parse_args()
    directory = weights.find(options.model).directory
    truth = Stock.load(directory, torch.float32)
    default = QwenReranker.load(options.model, device="cpu", threads=options.threads)
    report: dict[str, Any] = {
        "name": "scoring",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": git_commit(),
        "quick": options.quick,
        "model": {
            "name": default.card.name,
            "digest": default.card.digest,
            "parameters": default.card.parameters,
            "default_dtype": default.card.dtype,
        },
        "figures": [],
        "matrix_rate": [],
    }
    named = default.card.dtype if options.quick else options.dtype
    for dtype in (named,) if named else DTYPES:
        packed = QwenReranker.load(options.model, device="cpu", dtype=dtype, threads=options.threads)
        stock = truth if dtype == "fp32" else Stock.load(directory, torch.bfloat16)
        for case, rounds, batches in QUICK if options.quick else FULL:
            torch.set_num_threads(options.threads)  # the stock model's; the engine's threads have one each
            figure = run_case(case, packed, stock, truth, rounds, batches)
            report["figures"].append({"dtype": dtype, **figure})
            print(f"{dtype} {case.name}: {figure['speedup_over_padded']}x", file=sys.stderr)
        torch.set_num_threads(1)
        for case in CASES[1:2] if options.quick else CASES[:2]:
            report["matrix_rate"].append(measure_share(packed, stock, dtype, options.threads, case))
    report["session"] = measure_session(default)
    report["growth"] = measure_growth(
        default, truth, (10, 50, 100) if options.quick else (10, 100, 300, 1000)
    )
    report["aims"] = aims_of(report)
    print(json.dumps(report, indent=2))
    return 0 if all(aim["ok"] for aim in report["aims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
