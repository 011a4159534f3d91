"""Two gateways on one installation: keys, tokens and client certificates, over real sockets and real TLS.

`plain` stands behind a proxy (this test) that it trusts; `secure` ends TLS itself. What is changed at one is in force at
both.
"""

from __future__ import annotations

import base64
import hmac
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.acceptance.service_process import (
    IN_FORCE_S,
    Service,
    Tenant,
    await_ready,
    command,
    launch,
    new_home,
    serving,
    until,
)
from tests.acceptance.test_access import ASK, as_superuser, check_refused
from tests.certificates import CLIENT, SERVER, Issued, authority, issue

BACKEND = "spiffe://example.org/backend"
CHECKER = "spiffe://example.org/checker"


@dataclass
class Provider:
    """An identity provider: its signing keys, and the key set that it serves over https."""

    folder: Path
    ca: Issued
    keys: dict[str, ec.EllipticCurvePrivateKey]
    fetched: int = 0

    @property
    def key_set(self) -> bytes:
        listed = [
            {**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig"}
            for kid, key in self.keys.items()
        ]
        return json.dumps({"keys": listed}).encode()

    def token(self, issuer: str, kid: str = "first", **more: object) -> str:
        now = int(time.time())
        claims = {
            "iss": issuer,
            "aud": "pericarp",
            "sub": "alice",
            "iat": now,
            "exp": now + 600,
            "jti": f"token-{time.time_ns()}",
            "org": "acme",
            "groups": ["searchers"],
            **more,
        }
        return jwt.encode(claims, self.keys[kid], algorithm="ES256", headers={"kid": kid, "typ": "at+jwt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identities")


@pytest.fixture(scope="module")
def provider(folder: Path) -> Iterator[tuple[Provider, str]]:
    ca = authority("Provider CA")
    found = Provider(folder, ca, {"first": ec.generate_private_key(ec.SECP256R1())})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/keys":
                self.send_response(302)
                self.send_header("Location", "/keys")
                self.end_headers()
                return
            found.fetched += 1
            body = found.key_set
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issued = issue(ca, addresses=("127.0.0.1",), uses=(SERVER,))
    (folder / "provider.pem").write_bytes(issued.pem + issued.key_pem)
    (folder / "provider-ca.pem").write_bytes(ca.pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "provider.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found, f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def clients_ca(folder: Path) -> Issued:
    ca = authority("Clients' CA")
    (folder / "clients-ca.pem").write_bytes(ca.pem)
    return ca


@pytest.fixture(scope="module")
def identities(folder: Path, provider: tuple[Provider, str]) -> Path:
    found, url = provider
    (folder / "keys.json").write_bytes(found.key_set)
    path = folder / "identities.toml"
    common = 'audience = "pericarp"\nalgorithms = ["ES256"]\ntenant_claim = "org"\nrole_claim = "groups"\n'
    roles = 'roles = { searchers = "search", admins = "platform_admin" }\n'
    path.write_text(
        f'[[issuer]]\nname = "file"\nissuer = "https://file.example/"\nkeys_file = "{folder}/keys.json"\n{common}{roles}'
        f'[[issuer]]\nname = "url"\nissuer = "https://url.example/"\nkeys_url = "{url}/keys"\n'
        f'keys_ca = "{folder}/provider-ca.pem"\n{common}{roles}'
        f'[[issuer]]\nname = "moved"\nissuer = "https://moved.example/"\nkeys_url = "{url}/moved"\n'
        f'keys_ca = "{folder}/provider-ca.pem"\n{common}{roles}'
        f'[[certificate]]\nname = "backend"\nuri = "{BACKEND}"\ntenant = "acme"\nrole = "search"\n'
        f'[[certificate]]\nname = "checker"\nuri = "{CHECKER}"\ntenant = "acme"\nrole = "auditor"\n'
    )
    return path


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with new_home() as found:
        yield found


@pytest.fixture(scope="module")
def plain(home: Path, folder: Path, identities: Path, clients_ca: Issued) -> Iterator[Service]:
    with serving(
        home,
        PERICARP_IDENTITIES=str(identities),
        PERICARP_TRUSTED_PROXIES="127.0.0.1",
        PERICARP_CLIENT_CA=str(folder / "clients-ca.pem"),
        PERICARP_CLIENT_CERT_HEADER="true",
    ) as started:
        yield started


@pytest.fixture(scope="module")
def secure(plain: Service, folder: Path, identities: Path, clients_ca: Issued) -> Iterator[Service]:
    ca = authority("Servers' CA")
    (folder / "servers-ca.pem").write_bytes(ca.pem)
    issued = issue(ca, addresses=("127.0.0.1",), uses=(SERVER,))
    (folder / "server.pem").write_bytes(issued.pem)
    (folder / "server-key.pem").write_bytes(issued.key_pem)
    started = launch(
        plain.home,
        PERICARP_IDENTITIES=str(identities),
        PERICARP_TLS_CERTIFICATE=str(folder / "server.pem"),
        PERICARP_TLS_KEY=str(folder / "server-key.pem"),
        PERICARP_CLIENT_CA=str(folder / "clients-ca.pem"),
    )
    try:
        yield await_ready(started)
    finally:
        status = started.end()  # alone: the database goes on for the other gateway
    assert status == 0, started.stderr[-3000:]


@pytest.fixture(scope="module")
def acme(plain: Service, secure: Service) -> Tenant:
    return plain.make_tenant("acme")


@pytest.fixture(scope="module")
def beta(plain: Service, secure: Service) -> Tenant:
    return plain.make_tenant("beta")


def ask(
    service: Service,
    bearer: str | None = None,
    *,
    path: str = "/v1/models",
    certificate: Issued | None = None,
    folder: Path | None = None,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """One request on a connection of its own, over TLS where the service ends it."""
    verify: ssl.SSLContext | bool = True
    if service.url.startswith("https") and folder is not None:
        verify = ssl.create_default_context(cafile=folder / "servers-ca.pem")
        if certificate is not None:
            (folder / "client.pem").write_bytes(certificate.pem + certificate.key_pem)
            verify.load_cert_chain(folder / "client.pem")
    given = {**({"Authorization": f"Bearer {bearer}"} if bearer else {}), **(headers or {})}
    with httpx.Client(base_url=service.url, verify=verify, timeout=120, headers=given) as client:
        return client.get(path)


def handed_on(certificate: Issued, *chain: Issued) -> dict[str, str]:
    """The headers of RFC 9440."""

    def told(each: Issued) -> str:
        return f":{base64.b64encode(each.der).decode()}:"

    headers = {"Client-Cert": told(certificate)}
    return {**headers, "Client-Cert-Chain": ", ".join(map(told, chain))} if chain else headers


# -- in force at both gateways ----------------------------------------------------------------------------------


def at_both(plain: Service, secure: Service, folder: Path, key: str) -> list[int]:
    return [ask(plain, key).status_code, ask(secure, key, folder=folder).status_code]


def test_a_key_is_revoked_at_both_gateways(
    plain: Service, secure: Service, folder: Path, acme: Tenant
) -> None:
    made = plain.make_key("acme")
    assert at_both(plain, secure, folder, made["key"]) == [200, 200]
    assert plain.run("key", "revoke", made["id"]).returncode == 0
    assert at_both(plain, secure, folder, made["key"]) == [401, 401]


def test_a_key_is_revoked_at_both_gateways_although_nobody_can_hear_it(
    plain: Service, secure: Service, folder: Path, acme: Tenant
) -> None:
    made = plain.make_key("acme")
    assert at_both(plain, secure, folder, made["key"]) == [200, 200]
    end_listeners(plain)
    assert plain.run("key", "revoke", made["id"]).returncode == 0
    assert at_both(plain, secure, folder, made["key"]) == [401, 401]


def test_a_rotated_secret_and_an_address_list_hold_at_both(
    plain: Service, secure: Service, folder: Path, acme: Tenant
) -> None:
    made = plain.make_key("acme")
    assert at_both(plain, secure, folder, made["key"]) == [200, 200]
    rotated = plain.tell("key", "rotate", made["id"], "--overlap-hours", "0")
    assert at_both(plain, secure, folder, made["key"]) == [401, 401]
    assert at_both(plain, secure, folder, rotated["key"]) == [200, 200]
    far = plain.make_key("acme", "search", "--allow", "203.0.113.0/24")["key"]
    assert at_both(plain, secure, folder, far) == [401, 401]
    assert ask(plain, far, headers={"X-Forwarded-For": "192.0.2.1, 203.0.113.7"}).status_code == 200
    assert ask(plain, far, headers={"X-Forwarded-For": "203.0.113.7, 192.0.2.1"}).status_code == 401
    assert ask(secure, far, folder=folder, headers={"X-Forwarded-For": "203.0.113.7"}).status_code == 401


def test_a_suspended_tenant_is_refused_at_both(
    plain: Service, secure: Service, folder: Path, beta: Tenant
) -> None:
    assert at_both(plain, secure, folder, beta.key) == [200, 200]
    as_superuser(plain, "update pericarp.tenant set suspended_at = now() where name = 'beta'")
    time.sleep(IN_FORCE_S)
    assert at_both(plain, secure, folder, beta.key) == [403, 403]
    as_superuser(plain, "update pericarp.tenant set suspended_at = null where name = 'beta'")
    time.sleep(IN_FORCE_S)
    assert at_both(plain, secure, folder, beta.key) == [200, 200]


def end_listeners(service: Service) -> None:
    """Cut the connections on which both gateways hear of changes."""
    as_superuser(
        service,
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pericarp changes'",
        "SELECT 2",
    )


def test_a_leaked_key_ends_at_both_and_nobody_learns_which(
    plain: Service, secure: Service, folder: Path, acme: Tenant
) -> None:
    made = plain.make_key("acme")
    assert at_both(plain, secure, folder, made["key"]) == [200, 200]
    with httpx.Client(base_url=plain.url, timeout=120) as client:
        answers = [
            client.post("/v1/keys/leaked", json=[{"token": text, "url": "https://example.org/paste"}])
            for text in (made["key"], "prc_live_nothing", acme.key_id)
        ]
        assert [(each.status_code, each.json()) for each in answers] == [(202, {"received": 1})] * 3
        assert client.post("/v1/keys/leaked", json=[]).status_code == 422
        assert client.post("/v1/keys/leaked", content=b" " * 70_000).status_code == 413
    time.sleep(IN_FORCE_S)
    assert at_both(plain, secure, folder, made["key"]) == [401, 401]
    assert at_both(plain, secure, folder, acme.key) == [200, 200]
    listed = {key["id"]: key for key in plain.tell("key", "list", "acme")}
    assert listed[made["id"]]["revoked_reason"] == "leaked"
    assert "key.leaked" in [entry["operation"] for entry in plain.entries("acme")]


def test_last_use_is_written_with_its_address(
    plain: Service, secure: Service, folder: Path, acme: Tenant
) -> None:
    made = plain.make_key("acme")
    assert ask(plain, made["key"], headers={"X-Forwarded-For": "203.0.113.77"}).status_code == 200

    def used() -> bool:
        (key,) = (each for each in plain.tell("key", "list", "acme") if each["id"] == made["id"])
        return key["last_used_at"] is not None and key["last_used_address"] == "203.0.113.77"

    until(used, 120, every_s=1)


# -- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("issuer", ["https://file.example/", "https://url.example/"])
def test_a_token_opens_both_gateways_and_ranks(
    plain: Service, secure: Service, folder: Path, acme: Tenant, provider: tuple[Provider, str], issuer: str
) -> None:
    token = provider[0].token(issuer)
    until(
        lambda: ask(plain, token).status_code != 503 and ask(secure, token, folder=folder).status_code != 503,
        60,
    )
    assert at_both(plain, secure, folder, token) == [200, 200]
    answer = plain.rerank(ASK, token)
    assert answer.status_code == 200
    (entry,) = (each for each in plain.entries("acme") if each["request_id"] == answer.json()["id"])
    assert (entry["key_id"], entry["role"]) == (f"jwt:{issuer.split('//')[1].split('.')[0]}", "search")
    assert "alice" not in json.dumps(entry)
    assert len(entry["details"]["subject"]) == 43


def test_a_token_works_on_its_plane_alone(
    plain: Service, acme: Tenant, provider: tuple[Provider, str]
) -> None:
    admin = provider[0].token("https://file.example/", groups=["admins"])
    assert ask(plain, admin, path="/metrics").status_code == 200
    check_refused(ask(plain, admin))
    check_refused(ask(plain, provider[0].token("https://file.example/"), path="/metrics"))


def test_a_token_that_does_not_hold_is_one_and_the_same_answer(
    plain: Service, acme: Tenant, provider: tuple[Provider, str]
) -> None:
    found, issuer = provider[0], "https://file.example/"
    public = found.keys["first"].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head, body, signature = found.token(issuer).split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    shared = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"first"}').rstrip(b"=").decode()
    mac = (
        base64.urlsafe_b64encode(hmac.digest(pem, f"{shared}.{body}".encode(), "sha256"))
        .rstrip(b"=")
        .decode()
    )
    stranger = Provider(found.folder, found.ca, {"first": ec.generate_private_key(ec.SECP256R1())})
    for token in (
        f"{none}.{body}.",
        f"{none}.{body}.{signature}",
        f"{shared}.{body}.{mac}",
        f"{head}.{body}.{signature[:-2]}",
        f"{head}.{body}",
        stranger.token(issuer),
        found.token("https://nobody.example/"),
        found.token(issuer, aud="another"),
        found.token(issuer, exp=1),
        found.token(issuer, org="no-such-tenant"),
        found.token(issuer, groups=["cooks"]),
    ):
        check_refused(ask(plain, token))


def test_a_denied_token_is_refused_at_both(
    plain: Service, secure: Service, folder: Path, acme: Tenant, provider: tuple[Provider, str]
) -> None:
    token = provider[0].token("https://file.example/", jti="stolen-1")
    assert at_both(plain, secure, folder, token) == [200, 200]
    done = plain.run("token", "deny", "acme", "jwt:file", "stolen-1")
    assert done.returncode == 0, done.stderr
    assert at_both(plain, secure, folder, token) == [401, 401]
    assert ask(plain, provider[0].token("https://file.example/")).status_code == 200
    (denied,) = plain.tell("token", "denied", "acme")
    assert (denied["issuer"], denied["jti"]) == ("jwt:file", "stolen-1")


def test_a_new_key_of_the_provider_is_fetched_beside_the_requests(
    plain: Service, acme: Tenant, provider: tuple[Provider, str]
) -> None:
    found = provider[0]
    found.keys["second"] = ec.generate_private_key(ec.SECP256R1())
    token = found.token("https://url.example/", "second")
    fetched = found.fetched
    statuses = [ask(plain, token).status_code for _ in range(20)]
    assert statuses[0] == 401, "a request never waits for a provider"
    until(lambda: ask(plain, token).status_code == 200, 60, every_s=0.2)
    assert found.fetched - fetched <= 4, (
        "twenty strange tokens are no twenty fetches (there are two gateways)"
    )


def test_a_redirect_of_the_provider_is_not_followed(
    plain: Service, acme: Tenant, provider: tuple[Provider, str]
) -> None:
    answer = ask(plain, provider[0].token("https://moved.example/"))
    assert (answer.status_code, answer.json()["code"]) == (503, "issuer_unavailable")
    assert int(answer.headers["Retry-After"]) >= 1


# -- client certificates ----------------------------------------------------------------------------------------


def test_a_client_certificate_opens_where_tls_ends_here(
    secure: Service, folder: Path, acme: Tenant, clients_ca: Issued
) -> None:
    issued = issue(clients_ca, uris=(BACKEND,))
    assert ask(secure, certificate=issued, folder=folder).status_code == 200
    check_refused(ask(secure, folder=folder))
    check_refused(ask(secure, certificate=issued, folder=folder, path="/metrics"))
    check_refused(ask(secure, certificate=issue(clients_ca, uris=(CHECKER,)), folder=folder))
    check_refused(ask(secure, certificate=issue(clients_ca, uris=(BACKEND + "s",)), folder=folder))


@pytest.mark.parametrize(
    "kind", ["expired", "not-yet", "another-ca", "a-servers"], ids=lambda kind: str(kind)
)
def test_a_certificate_that_does_not_hold_ends_the_connection(
    secure: Service, folder: Path, acme: Tenant, clients_ca: Issued, kind: str
) -> None:
    issued = {
        "expired": lambda: issue(clients_ca, uris=(BACKEND,), days=(-10, -1)),
        "not-yet": lambda: issue(clients_ca, uris=(BACKEND,), days=(1, 10)),
        "another-ca": lambda: issue(authority("Clients' CA"), uris=(BACKEND,)),
        "a-servers": lambda: issue(clients_ca, uris=(BACKEND,), uses=(SERVER,)),
    }[kind]()
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        ask(secure, certificate=issued, folder=folder)
    assert ask(secure, acme.key, folder=folder).status_code == 200, "others go on"


def test_a_trusted_proxy_hands_a_certificate_on(plain: Service, acme: Tenant, clients_ca: Issued) -> None:
    issued = issue(clients_ca, uris=(BACKEND,), uses=(SERVER, CLIENT))
    between = authority("Between", clients_ca)
    assert ask(plain, headers=handed_on(issued)).status_code == 200
    assert ask(plain, headers=handed_on(issue(between, uris=(BACKEND,)), between)).status_code == 200
    other = authority("Clients' CA")
    for wrong in (
        handed_on(issue(between, uris=(BACKEND,))),
        handed_on(issue(clients_ca, uris=(BACKEND,), days=(-10, -1))),
        handed_on(issue(clients_ca, uris=(BACKEND,), uses=(SERVER,))),
        handed_on(issue(other, uris=(BACKEND,)), other),
        {"Client-Cert": base64.b64encode(issued.der).decode()},
        {"Client-Cert": ":!:"},
        {"Client-Cert": f"{handed_on(issued)['Client-Cert']}, {handed_on(issued)['Client-Cert']}"},
    ):
        check_refused(ask(plain, headers=wrong))


def test_a_header_from_anybody_else_is_no_certificate(
    secure: Service, folder: Path, acme: Tenant, clients_ca: Issued
) -> None:
    check_refused(ask(secure, folder=folder, headers=handed_on(issue(clients_ca, uris=(BACKEND,)))))


def test_who_is_two_at_once_is_nobody(
    plain: Service,
    secure: Service,
    folder: Path,
    acme: Tenant,
    beta: Tenant,
    clients_ca: Issued,
    provider: tuple[Provider, str],
) -> None:
    backend = issue(clients_ca, uris=(BACKEND,))
    unknown = issue(clients_ca, uris=("spiffe://example.org/unknown",))
    token = provider[0].token("https://file.example/")
    for bearer in (acme.key, token):
        assert ask(secure, bearer, certificate=backend, folder=folder).status_code == 200
        assert ask(plain, bearer, headers=handed_on(backend)).status_code == 200
        assert ask(secure, bearer, certificate=unknown, folder=folder).status_code == 200
    for bearer in (beta.key, provider[0].token("https://file.example/", org="beta"), "prc_live_nothing"):
        check_refused(ask(secure, bearer, certificate=backend, folder=folder))
        check_refused(ask(plain, bearer, headers=handed_on(backend)))
    with httpx.Client(base_url=plain.url, timeout=120) as client:
        check_refused(
            client.get(
                "/v1/models",
                headers=[("Authorization", f"Bearer {acme.key}"), ("Authorization", f"Bearer {acme.key}")],
            )
        )


def test_a_wrong_file_ends_the_start_with_one_sentence(home: Path, folder: Path) -> None:
    wrong = folder / "wrong.toml"
    wrong.write_text('[[issuer]]\nname = "x"\nalgorithms = ["HS256"]\n')
    done = command(home, "serve", PERICARP_IDENTITIES=str(wrong))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InvalidIdentities: ")
    assert "issuer[0].algorithms" in last
    done = command(home, "serve", PERICARP_CLIENT_CERT_HEADER="true")
    assert done.returncode == 2
    assert "PERICARP_TRUSTED_PROXIES" in done.stderr
