"""Settings that would leave something open are refused, and secrets come from where systemd puts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.cli.opening import read_settings
from service.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "pericarp.example"])
def test_other_hosts_may_connect_only_by_tls_a_proxy_or_an_explicit_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="in the clear"):
        Settings(host=host)
    file = tmp_path / "pem"
    file.touch()
    assert Settings(host=host, tls_certificate=file, tls_key=file).host == host
    assert Settings(host=host, trusted_proxies=("10.0.0.0/8",)).host == host
    assert Settings(host=host, plaintext=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_host_alone_needs_no_tls(host: str) -> None:
    assert Settings(host=host).listens_inside


def test_a_tenants_share_of_bodies_holds_one_body() -> None:
    with pytest.raises(ValidationError, match="PERICARP_TENANT_BODY_BYTES"):
        Settings(tenant_body_bytes=2048, body_limit_bytes=4096)


def test_credentials_are_read_from_their_folder_and_the_environment_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "PERICARP_DATABASE_URL").write_text("postgresql://pericarp_app:hidden@db/pericarp\n")
    (tmp_path / "PERICARP_PORT").write_text("1")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("PERICARP_PORT", "8443")
    settings = read_settings()
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == "postgresql://pericarp_app:hidden@db/pericarp"
    assert settings.port == 8443
    assert "hidden" not in repr(settings)
