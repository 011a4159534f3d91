"""Memory into which one child writes large answers, and from which the gateway takes them: one copy instead of the wire's four.

Its size is sealed (memfd_create(2), F_SEAL_SHRINK): a child cannot take pages away from under the gateway that reads them.
The child may write whenever it likes, so what counts is what was copied out, and that is checked afterwards. What was
taken is overwritten at once: a child finds nothing there of the image before.
"""

from __future__ import annotations

import fcntl
import mmap
import os


class Region:
    """The gateway's side, for the life of one child."""

    def __init__(self, size_bytes: int) -> None:
        """Raises OSError where there is no memory."""
        self.descriptor = os.memfd_create("pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        """For the child to inherit; closed by `close`."""
        try:
            os.ftruncate(self.descriptor, size_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self._memory = mmap.mmap(self.descriptor, size_bytes)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._zeros = memoryview(bytes(size_bytes))

    def take(self, size_bytes: int) -> bytes:
        """The first `size_bytes` as they are now, which are zeros afterwards."""
        taken = self._memory[:size_bytes]
        self._memory[: len(taken)] = self._zeros[: len(taken)]
        return taken

    def close(self) -> None:
        """Let go of it. A child that lives keeps its own mapping."""
        self._memory.close()
        os.close(self.descriptor)


def open_region(descriptor: int) -> mmap.mmap:
    """The child's side of an inherited region. Raises OSError, ValueError.

    `descriptor` is closed. Python keeps a duplicate for as long as it is mapped, with which the lock lets nobody do anything.
    """
    memory = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    return memory
