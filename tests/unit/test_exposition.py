"""Metrics of a gateway that has nothing but itself: no database, no worker, no screening child."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from itertools import product

import httpx
import pytest

from service.api.metrics import MetricsPort
from service.cosigning import AWAY, FAILED, INCONSISTENT, REFUSED
from service.errors import TABLE
from service.exposition import Exposition
from service.fleet.local import LocalFleet
from service.fleet.tally import Retirement
from service.processes.children import Cause
from service.screening import ImageLimits
from service.screening.pool import Screen
from service.screening.readers import Readers
from service.sequencing import Sequencing
from service.watch import metrics
from tenants.database import Database
from tenants.sequencer import Sequencer, log_signer


@pytest.fixture
def exposition() -> Exposition:
    """Of real parts, none of them started; the database's socket does not exist."""
    database = Database("postgresql://nobody@/nothing?host=/nowhere")
    return Exposition(
        fleet=LocalFleet(model="puppet"),
        screen=Screen(limits=ImageLimits(1024, 1024, 64, 2, 1), children=1, timeout_s=1.0),
        readers=Readers(timeout_s=1.0),
        sequencing=Sequencing(Sequencer(database, log_signer(bytes(32)))),
    )


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def value(text: bytes, series: str) -> float:
    (line,) = (line for line in text.decode().splitlines() if line.startswith(f"{series} "))
    return float(line.split()[-1])


async def test_they_are_there_while_the_database_is_away(exposition: Exposition) -> None:
    told = await exposition.render()
    assert value(told, 'pericarp_ready{part="worker"}') == 0
    assert value(told, 'pericarp_ready{part="screening"}') == 0
    assert value(told, 'pericarp_backup_timestamp_seconds{step="verify"}') == 0, "none is known"
    assert value(told, "pericarp_oldest_wait_seconds") == 0


async def test_totals_that_others_keep_are_told_once(exposition: Exposition) -> None:
    ends = 'pericarp_worker_ends_total{reason="silent"}'
    tally = exposition._fleet.tally
    tally.ends["silent"] += 2
    first = value(await exposition.render(), ends)
    assert value(await exposition.render(), ends) == first
    tally.ends["silent"] += 1
    assert value(await exposition.render(), ends) == first + 1


async def test_the_port_ends_with_the_gateway_and_may_begin_again(exposition: Exposition) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    port = MetricsPort(exposition, host="127.0.0.1", port=number)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{number}") as client:
        for _ in range(2):
            await port.start()
            assert (await client.get("/metrics")).status_code == 200
            await port.close()
            await port.close()
            with pytest.raises(httpx.TransportError):
                await client.get("/metrics")


async def test_without_a_number_there_is_no_port(exposition: Exposition) -> None:
    port = MetricsPort(exposition, host="127.0.0.1", port=None)
    await port.start()
    await port.close()


async def test_a_port_that_is_taken_is_an_error_and_a_line_in_the_log(
    exposition: Exposition, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="in use"):
        await MetricsPort(exposition, host="127.0.0.1", port=taken).start()
    assert "metrics_failed" in capsys.readouterr().out


def test_what_can_be_counted_is_there_before_it_is() -> None:
    """An alert upon the first count needs a zero before it; so these lists hold every word that is counted."""
    told = metrics.render()
    losses = set(Cause) - {Cause.STOPPED}
    ends = {way.name.lower() for way in Retirement} | losses - {Cause.DECODER}
    for reason in ends:
        assert value(told, f'pericarp_worker_ends_total{{reason="{reason}"}}') >= 0
    for looks_at, reason in product(("images", "texts"), losses - {Cause.WEIGHTS, Cause.CONTAINED}):
        series = f'pericarp_screening_losses_total{{looks_at="{looks_at}",reason="{reason}"}}'
        assert value(told, series) >= 0
    for code in {meaning.code for meaning in TABLE.values()} | {"internal"}:
        assert value(told, f'pericarp_refusals_total{{code="{code}"}}') >= 0
    for state in (AWAY, REFUSED, INCONSISTENT, FAILED):
        assert value(told, f'pericarp_log_cosigning_failures_total{{reason="{state}"}}') >= 0


def test_backups_are_told_by_step() -> None:
    series = 'pericarp_backup_timestamp_seconds{step="verify"}'
    before_s = time.time()
    metrics.note_backup("verify", 60.0)
    assert before_s - 60.0 <= value(metrics.render(), series) <= time.time() - 60.0
    metrics.note_backup("verify", None)
    assert value(metrics.render(), series) == 0, "there never was one: no age is too great for that"
    with pytest.raises(ValueError, match="no step"):
        metrics.note_backup("restored", 1.0)
