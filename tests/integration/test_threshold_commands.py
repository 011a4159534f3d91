"""`thresholds …` on the command line, in processes of their own, over a database that has evidence."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from tenants.database import Database
from tenants.directory import Directory
from tenants.evidence import Evidence, Measure, Screened
from tenants.policies import Setter
from tenants.reviews import Place, Reviews, Verdict
from tenants.risk import Category, Mode
from tests.acceptance import commands
from tests.integration.conftest import Secrets

NAME = f"commands-{secrets.token_hex(4)}"
DETECTORS = "lexicon 1"


class Console:
    """Runs commands."""

    def __init__(self, app_url: str, home: Path) -> None:
        self._env = {**os.environ, "PERICARP_DATABASE_URL": app_url, "PERICARP_HOME": str(home)}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return commands.run(["thresholds", *words], self._env, 120.0)

    def tell(self, *words: str) -> Any:
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def console(app_url: str, tmp_path_factory: pytest.TempPathFactory) -> Console:
    return Console(app_url, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def last(app_url: str, installation_secrets: Secrets) -> Place:
    """The one item that waits, after 49 others were judged harmful."""

    async def build() -> Place:
        database = Database(app_url)
        await database.open()
        try:
            directory = Directory(
                database, pepper=installation_secrets.pepper, master_key=installation_secrets.master_key
            )
            tenant = (await directory.create_tenant(NAME)).id
            evidence, reviews = Evidence(database), Reviews(database)
            places = [Place(uuid.uuid4(), "documents[3]", Category.HATE, Mode.TEXT) for _ in range(50)]
            measures = [Measure(Category.HATE, 0.4, 0.6, for_review=True)]
            for place in places:
                user = secrets.token_hex(8)
                evidence.note(
                    tenant, [Screened(place.entry_id, place.item, place.mode, user, DETECTORS, measures)]
                )
            await evidence.write()
            for place in places[:49]:
                await reviews.decide(tenant, place, Verdict.HARMFUL, by=Setter())
            return places[49]
        finally:
            await database.close()

    return asyncio.run(build())


def test_a_reviewer_labels_what_waits_and_an_operator_undoes_what_it_moved(
    console: Console, last: Place
) -> None:
    (waiting,) = console.tell("waiting", NAME)
    assert (waiting["entry"], waiting["item"], waiting["drawn"]) == (str(last.entry_id), "documents[3]", True)
    labelled = console.tell("label", NAME, str(last.entry_id), "documents[3]", "hate", "text", "harmful")
    assert (labelled["votes"], labelled["decided_by"]) == (True, "operator")
    assert (labelled["change"]["before"], labelled["change"]["after"]) == (0.6, 0.59)
    (hate,) = [
        each for each in console.tell("list", NAME) if (each["category"], each["mode"]) == ("hate", "text")
    ]
    assert (hate["threshold"], hate["anchor"], hate["bounds"]) == (0.59, 0.6, [0.5, 0.7])
    assert console.tell("step", NAME) == [], "the day's way is done"
    assert console.tell("step") == []
    (change,) = console.tell("rollback", NAME)
    assert (change["after"], change["reason"], change["set_by"]) == (0.6, "rollback", "operator")
    history = console.tell("list", NAME, "--history", "10")
    assert [each["reason"] for each in history] == ["rollback", "tighter"]
    shown = console.run("list", NAME, "--history", "10")
    assert shown.returncode == 0 and "rollback" in shown.stdout and "votes=50" in shown.stdout
    (change,) = console.tell("rollback", NAME, "--category", "hate", "--mode", "text", "--version", "1")
    assert change["after"] == 0.59


def test_canaries_come_from_a_file(console: Console, last: Place, tmp_path: Path) -> None:
    canary = {"category": "hate", "mode": "text", "name": "slur-1", "score": 0.9, "detectors": DETECTORS}
    file = tmp_path / "canaries.json"
    file.write_text(json.dumps([canary]))
    assert console.tell("canaries", NAME, str(file)) == console.tell("canaries", NAME) == [canary]
    assert console.tell("canaries", "--all", str(file)) == console.tell("canaries", "--all") == [canary]
    file.write_text(json.dumps([{**canary, "category": "politics"}]))
    refused = console.run("canaries", NAME, str(file))
    assert refused.returncode == 1 and refused.stderr.startswith("Invalid: 0.category")
    assert console.tell("canaries", NAME) == [canary]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("list", "nobody"), "TenantNotFound: "),
        (("label", NAME, str(uuid.UUID(int=1)), "query", "hate", "text", "harmful"), "ReviewNotFound: "),
        (("appeal", NAME, str(uuid.UUID(int=1)), "query", "hate", "text"), "ReviewNotFound: "),
        (("rollback", NAME, "--category", "gore", "--mode", "image"), "ThresholdNotFound: "),
    ],
)
def test_what_is_wrong_is_one_sentence(
    console: Console, last: Place, words: tuple[str, ...], says: str
) -> None:
    done = console.run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(says)
