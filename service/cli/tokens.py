"""`token …`: tokens and client certificates that are denied although they are valid."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.console import JsonFlag, TenantName, cell, print_json, print_records, tell
from service.cli.opening import at_desk, operator
from service.desk import Desk
from tenants.denials import Denial

app = typer.Typer(help="Tokens and client certificates: deny, list what is denied.", no_args_is_help=True)


@app.command("deny")
def deny_token(
    tenant: TenantName,
    issuer: Annotated[
        str, typer.Argument(help="jwt:NAME of an issuer, or mtls:NAME of a certificate's entry.")
    ],
    jti: Annotated[str, typer.Argument(help="The token's jti, or the certificate's SHA-256 in hex.")],
    as_json: JsonFlag = False,
) -> None:
    """Refuse a token or a client certificate, everywhere within 2 seconds."""

    async def deny(desk: Desk) -> Denial:
        found = await desk.directory.find_tenant(tenant)
        return await desk.administration.deny_token(operator(), found.id, issuer, jti)

    denial = at_desk(deny)
    if as_json:
        print_json(tell(denial))
    else:
        typer.echo(f"{denial.jti} of {denial.issuer} is denied since {cell(denial.denied_at)} UTC.")


@app.command("denied")
def list_denied(tenant: TenantName, as_json: JsonFlag = False) -> None:
    """List what a tenant denies, newest first."""

    async def find(desk: Desk) -> tuple[Denial, ...]:
        return await desk.denials.list((await desk.directory.find_tenant(tenant)).id)

    columns = ["issuer", "jti", "denied_at", "until"]
    denials = [tell(denial) for denial in at_desk(find)]
    print_records(f"Denied by {tenant}", columns, denials, as_json=as_json)
