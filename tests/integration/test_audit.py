"""The log: canonical bytes, keyed fingerprints, appended and never changed."""

from __future__ import annotations

import string
import unicodedata
import uuid
from dataclasses import replace

import asyncpg
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.access import TenantId
from tenants.audit import Audit, Decision, Entry, Fingerprints, ItemPrint, decode, encode, micro_units
from tenants.database import Database
from tenants.errors import EntryInvalid, SealBroken, TenantNotFound
from tests.integration.conftest import MakeCaller, Secrets, run_as_superuser

SAFE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
COUNTS = st.integers(0, 2**53 - 1)
PRINTS = st.text(string.ascii_letters, min_size=43, max_size=43)
ITEMS = st.builds(ItemPrint, text=PRINTS, chars=COUNTS) | st.builds(
    ItemPrint, text=PRINTS, chars=COUNTS, image=PRINTS, bytes=COUNTS
)
ENTRIES = st.builds(
    Entry,
    request_id=st.uuids().map(str),
    tenant=st.uuids(),
    key_id=SAFE,
    role=SAFE,
    operation=SAFE,
    decision=st.sampled_from(Decision),
    code=SAFE,
    status=COUNTS,
    at_us=COUNTS,
    query=st.none() | ITEMS,
    documents=st.lists(ITEMS, max_size=4).map(tuple),
    document_count=COUNTS,
    image_count=COUNTS,
    places=st.lists(st.tuples(COUNTS, COUNTS), max_size=4).map(tuple),
    input_tokens=COUNTS,
    image_tokens=COUNTS,
    model=SAFE,
    model_digest=SAFE,
    stages_us=st.dictionaries(st.text(string.ascii_lowercase, min_size=1), COUNTS, max_size=3).map(
        lambda stages: tuple(sorted(stages.items()))
    ),
    client=SAFE,
    session=SAFE,
)


def entry_for(tenant: TenantId, **changes: object) -> Entry:
    plain = Entry(
        request_id=str(uuid.uuid4()),
        tenant=tenant,
        key_id="k" * 12,
        role="search",
        operation="rerank",
        decision=Decision.REFUSED,
        code="quota_exceeded",
        status=429,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# -- bytes ------------------------------------------------------------------------------------------------------


@given(ENTRIES)
def test_every_entry_reads_back_equal_from_canonical_bytes(entry: Entry) -> None:
    body = encode(entry)
    assert decode(body) == entry
    assert body == orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
    assert _only_integers_and_strings(orjson.loads(body))


def test_an_entry_that_tells_of_no_session_has_the_bytes_it_had_before_there_were_any() -> None:
    entry = entry_for(TenantId(uuid.uuid4()))
    assert b"session" not in encode(entry)
    assert decode(encode(entry)).session == ""
    with pytest.raises(EntryInvalid):
        decode(encode(entry).replace(b'"stages_us"', b'"session":"","stages_us"'))


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"{", b'{"at_us":1}'])
def test_other_bytes_are_no_entry(body: bytes) -> None:
    with pytest.raises(EntryInvalid):
        decode(body)


def test_bytes_that_were_built_otherwise_are_no_entry() -> None:
    body = encode(entry_for(TenantId(uuid.uuid4())))
    for other in (
        body.replace(b":", b": ", 1),
        body[:-1] + b',"zz":1}',
        body.replace(b'"status":429', b'"status":429.0'),
    ):
        assert other != body
        with pytest.raises(EntryInvalid):
            decode(other)


def test_scores_become_micro_units() -> None:
    assert [micro_units(score) for score in (0.0, 1.0, 0.1234565, 0.9999999)] == [
        0,
        1_000_000,
        123_456,
        1_000_000,
    ]


# -- fingerprints -----------------------------------------------------------------------------------------------


@given(st.text())
def test_text_counts_in_nfc(text: str) -> None:
    prints = Fingerprints(bytes(32))
    assert prints.text(text) == prints.text(unicodedata.normalize("NFD", text))
    assert len(prints.text(text)) == 43


def test_fingerprints_differ_by_key_kind_and_input() -> None:
    one, other = Fingerprints(b"a" * 32), Fingerprints(b"b" * 32)
    told = [
        one.text("x"),
        other.text("x"),
        one.image(b"x"),
        one.address("x"),
        one.text("X"),
        one.text("x "),
        one.text(""),
    ]
    assert len(set(told)) == len(told)
    assert one.text("x") == Fingerprints(b"a" * 32).text("x")


def test_an_item_tells_sizes_and_never_input() -> None:
    item = Fingerprints(bytes(32)).item("secret words", b"pixels")
    assert (item.chars, item.bytes) == (12, 6)
    assert "secret" not in repr(item)
    assert Fingerprints(bytes(32)).item(None, None) == ItemPrint()


async def test_a_tenants_fingerprints_are_its_own_and_stay(
    database: Database, audit: Audit, make_caller: MakeCaller, installation_secrets: Secrets
) -> None:
    first, second = await make_caller(), await make_caller()
    assert (await audit.fingerprints(first.tenant)).text("x") != (
        await audit.fingerprints(second.tenant)
    ).text("x")
    afresh = Audit(database, master_key=installation_secrets.master_key)
    assert (await afresh.fingerprints(first.tenant)).text("x") == (
        await audit.fingerprints(first.tenant)
    ).text("x")
    with pytest.raises(SealBroken):
        await Audit(database, master_key=bytes(32)).fingerprints(first.tenant)
    with pytest.raises(TenantNotFound):
        await audit.fingerprints(TenantId(uuid.uuid4()))


async def test_a_destroyed_key_ends_the_link(
    database: Database, make_caller: MakeCaller, superuser_url: str, installation_secrets: Secrets
) -> None:
    caller = await make_caller()
    await run_as_superuser(
        superuser_url, f"update pericarp.tenant set audit_key = null where id = '{caller.tenant}'"
    )
    with pytest.raises(SealBroken):
        await Audit(database, master_key=installation_secrets.master_key).fingerprints(caller.tenant)


# -- the log ----------------------------------------------------------------------------------------------------


async def test_a_refusal_is_recorded_once_and_verbatim(audit: Audit, make_caller: MakeCaller) -> None:
    caller = await make_caller()
    entry = entry_for(caller.tenant)
    receipt = await audit.record(entry)
    assert await audit.record(replace(entry, code="other")) == receipt
    (recorded,) = await audit.list_entries(caller.tenant)
    assert (recorded.id, recorded.body, recorded.schema_version) == (receipt, encode(entry), 1)
    assert decode(recorded.body) == entry


async def test_pages_follow_each_other_without_gap_or_repeat(audit: Audit, make_caller: MakeCaller) -> None:
    caller = await make_caller()
    receipts = [await audit.record(entry_for(caller.tenant)) for _ in range(7)]
    seen: list[uuid.UUID] = []
    while page := await audit.list_entries(caller.tenant, limit=3, before=seen[-1] if seen else None):
        seen += [entry.id for entry in page]
    assert seen == receipts[::-1]


async def test_the_largest_request_fits_into_one_entry(audit: Audit, make_caller: MakeCaller) -> None:
    caller = await make_caller()
    item = Fingerprints(bytes(32)).item("x" * 10_000, bytes(10))
    entry = entry_for(
        caller.tenant,
        query=item,
        documents=(item,) * 1_000,
        places=tuple((index, 1_000_000) for index in range(1_000)),
    )
    assert len(encode(entry)) < 256 * 1024
    await audit.record(entry)


@pytest.mark.parametrize(
    "change", ["update pericarp.audit_inbox set body = '{}'", "delete from pericarp.audit_inbox"]
)
async def test_the_runtime_role_can_change_no_entry(
    app_url: str, audit: Audit, make_caller: MakeCaller, change: str
) -> None:
    caller = await make_caller()
    await audit.record(entry_for(caller.tenant))
    connection = await asyncpg.connect(app_url)
    try:
        await connection.execute("select set_config('app.tenant_id', $1, false)", str(caller.tenant))
        assert await connection.fetchval("select count(*) from pericarp.audit_inbox") == 1
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(change)
    finally:
        await connection.close()


@pytest.mark.parametrize("mode", ["origin", "replica"])
@pytest.mark.parametrize(
    "change",
    [
        "update pericarp.audit_inbox set body = '{}'",
        "update pericarp.audit_inbox set body = null",
        "update pericarp.audit_inbox set recorded_at = recorded_at - interval '10 years', body = null",
        "delete from pericarp.audit_inbox",
        "truncate pericarp.audit_inbox",
    ],
)
async def test_not_even_a_superuser_changes_an_entry_by_accident(
    superuser_url: str, audit: Audit, make_caller: MakeCaller, mode: str, change: str
) -> None:
    await audit.record(entry_for((await make_caller()).tenant))
    connection = await asyncpg.connect(superuser_url)
    try:
        await connection.execute(f"set session_replication_role = '{mode}'")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="never changed"):
            await connection.execute(change)
    finally:
        await connection.close()


def _only_integers_and_strings(value: object) -> bool:
    if isinstance(value, dict):
        keys = set(string.ascii_lowercase + string.digits + "_")
        return all(set(key) <= keys and _only_integers_and_strings(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_only_integers_and_strings, value))
    return isinstance(value, int | str) and not isinstance(value, bool)
