"""The workers of a fleet score with one copy of the weights, which none of them can change."""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path

import pytest
import torch

from models import Item, Job, weights
from models.loading import load_model
from models.sealing import SealedWeights
from service.fleet.local import LocalFleet
from tests.tiny_qwen import save_checkpoint

JOB = Job(Item("red shoe"), (Item("a red shoe"), Item("something else")))
TENANTS = ("11111111-acme", "22222222-rival")


def maps(pid: int) -> list[list[str]]:
    """A process's mappings of weights, each as the fields of /proc/PID/maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5) for line in lines if "/memfd:weights" in line or ".safetensors" in line]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into a process that may not be dumped")
def test_workers_map_one_sealed_copy_and_keep_no_descriptor_of_it(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path)  # in fp32; its workers score in bf16, and so in a converted copy

    async def play() -> None:
        fleet = LocalFleet(model=str(directory), device="cpu", dtype="bf16", spare_workers=1, max_workers=2)
        await fleet.start()
        try:
            scored = [await fleet.score(tenant, JOB, deadline_s=120) for tenant in TENANTS]
            assert scored[0].scores.margins == scored[1].scores.margins
            workers = [worker.pid for worker in fleet.workers() if worker.tenant]
            assert len(workers) == 2
            for pid in workers:
                (mapping,) = maps(pid)
                assert mapping[1] == "rw-p"  # private: a page that is written to is no longer the others'
                assert mapping[4] == maps(workers[0])[0][4]  # the same inode
                files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                assert not any("memfd" in file for file in files)
            memory = fleet._starts._memory
            assert memory is not None
            assert SealedWeights(memory).sealed
            with pytest.raises(PermissionError):
                os.pwrite(memory, b"x", 0)
            again = weights.find(str(directory), known=SealedWeights(memory).hashes())
            assert fleet.card is not None
            assert again.digest == fleet.card.digest
            load_model(again, torch.device("cpu"), torch.bfloat16, shared=SealedWeights(memory))
        finally:
            await fleet.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            fcntl.fcntl(memory, fcntl.F_GETFD)

    asyncio.run(play())
