"""`doctor` beside the running service, as its operator runs it."""

from __future__ import annotations

import json
from typing import Any

from tests.acceptance.service_process import Service

HOLD = {
    *(
        "home",
        "secrets",
        "log files",
        "database files",
        "model",
        "signature",
        "reach",
        "certificates",
        "service",
        "detectors",
    ),
    *("core dumps", "arguments", "children", "users", "schema", "role", "row security", "durability"),
    *("statements", "connection", "clock", "log tree", "log lag"),
}
"""Whatever the host is: what depends on its kernel, its disk or on who runs the tests is left out."""


def look(service: Service) -> dict[str, dict[str, Any]]:
    done = service.run("doctor", "--url", service.url, "--json")
    assert done.returncode == 1, done.stderr  # there is no witness
    told = json.loads(done.stdout)
    assert told["holds"] is False
    return {check["name"]: check for check in told["checks"]}


def test_what_holds_holds_and_what_is_changed_is_found(service: Service) -> None:
    checks = look(service)
    assert {name: checks[name]["seen"] for name in HOLD if checks[name]["state"] != "holds"} == {}
    assert not [check for check in checks.values() if "the check itself failed" in check["seen"]]
    witnesses = checks["witnesses"]
    assert witnesses["state"] == "does not hold" and "PERICARP_WITNESSES" in witnesses["remedy"]
    assert checks["alerts"]["seen"] == "alerts go to the log alone"
    assert checks["backups"]["seen"] == "there is no backup; none was ever verified"
    pepper = service.home / "secrets" / "pepper"
    pepper.chmod(0o644)
    try:
        done = service.run("doctor", "--only", "secrets")
    finally:
        pepper.chmod(0o600)
    assert done.returncode == 1 and "0644" in done.stdout
    assert "1 does not hold" in done.stdout
