"""A place for one child that decodes images, and for the memory that it writes pixels into."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from service.processes.children import Child, ChildLost, Launch, start_child
from service.processes.shared_memory import Region
from service.screening.diary import Diary
from service.screening.messages import REGION_BYTES


@dataclass(slots=True, eq=False)
class Slot:
    """Whoever took it from the idle queue uses it alone."""

    child: Child | None = None
    region: Region | None = None
    images: int = 0
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    diary: Diary = field(default_factory=lambda: Diary("images"))

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.alive

    async def start(self, launch: Launch) -> Child:
        """A new child with a region of its own, in the place of one that is gone. Raises ChildLost."""
        await self.stop()
        try:
            region = Region(REGION_BYTES)
        except OSError as exc:
            raise ChildLost(f"no memory for its pixels: {type(exc).__name__}") from exc
        try:
            self.child = await start_child(replace(launch, shared=region.descriptor))
        except BaseException:
            region.close()
            raise
        self.region, self.images = region, 0
        self.diary.tell_confinement(self.child)
        return self.child

    async def stop(self) -> None:
        """End the child, and let go of its region."""
        if self.child is not None:
            await self.child.stop()
        if self.region is not None:
            self.region.close()
            self.region = None
