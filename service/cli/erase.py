"""`audit erase`: end what ties the log to a tenant's inputs, or to one person."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import typer

from service.cli.console import JsonFlag, TenantName, print_record
from service.cli.opening import installation, operator, work_in
from service.desk import Desk
from tenants.erasure import rewrite_keys

MOST_REASON = 200


def erase(
    tenant: TenantName,
    reason: Annotated[
        str,
        typer.Option(help="Who asked, and why, as the log is to say it: a reference, not a person's name."),
    ],
    subject: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only what is of this end user, of this token's `sub`, or of this name in a certificate.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Destroy the key of a tenant's fingerprints, or take away the entries of one subject. Nothing brings them back.

    Without --subject a new key stands in the old one's place: entries stay, and nothing ties those of before to an
    input, an address or a person any more. With it the subject's entries lose their bodies. No proof breaks.
    """
    if not (reason.strip() and reason.isprintable() and len(reason) <= MOST_REASON):
        raise typer.BadParameter(f"--reason is 1 to {MOST_REASON} printable characters")

    async def work(desk: Desk) -> dict[str, Any]:
        found = await desk.directory.find_tenant(tenant)
        actor = operator()
        if subject is not None:
            erased = await desk.erasing.erase_subject(actor, found.id, subject, reason=reason)
            return {"tenant": tenant, **asdict(erased)}
        await desk.erasing.erase(actor, found.id, reason=reason)
        return {"tenant": tenant, "warrants": [actor.receipt]}

    with installation() as (_settings, found):
        record = work_in(found, work)
        if subject is None and found.owner_url is not None:
            asyncio.run(rewrite_keys(found.owner_url))
    print_record("Erased", record, as_json=as_json)
