"""Whether the service on this host is ready, for a container's health check: no shell, no other program."""

from __future__ import annotations

import http.client
import json
import ssl
import sys

import typer

from service.cli.opening import read_settings

ANSWER_S = 4.0
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what listens everywhere is asked on the loopback


def health() -> None:
    """Ask `/readyz` of the service on this host; exit status 0 where it is ready, 1 where not."""
    settings = read_settings()
    host = ANY.get(settings.host, settings.host)
    try:
        status, body = _ask(host, settings.port, tls=settings.tls_certificate is not None)
    except (OSError, http.client.HTTPException) as exc:
        typer.echo(f"Nobody answers on port {settings.port}: {type(exc).__name__}.", err=True)
        sys.exit(1)
    if status != 200:
        typer.echo(_detail(body), err=True)
        sys.exit(1)
    typer.echo("ready")


def _ask(host: str, port: int, *, tls: bool) -> tuple[int, bytes]:
    if tls:
        # It is on this host, and is told nothing: whose name its certificate has does not matter here.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=ANSWER_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _detail(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return "It is not ready, and does not say why."
