"""The service, but no text is read: what `bench/screening.py` compares with. `python bench/unread.py serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from service.__main__ import main
from service.screening.signals import Findings
from service.vetting import Vetting
from tenants.access import Caller


async def find_nothing(
    _: Vetting, _caller: Caller, texts: Sequence[str], _query: str | None
) -> list[Findings]:
    return [Findings()] * len(texts)


if __name__ == "__main__":
    setattr(Vetting, "_read", find_nothing)  # noqa: B010  mypy forbids to assign a method
    main()
