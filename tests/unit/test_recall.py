"""Equal content of one tenant is known again; another's never is, and nothing grows without bound."""

from __future__ import annotations

from service.screening.recall import MOST_KEPT, MOST_TENANTS, Recall


def kept(recall: Recall[int], tenant: str, content: bytes, context: bytes = b"v1") -> int | None:
    return recall.find(tenant, recall.key(tenant, content, context))


def keep(recall: Recall[int], tenant: str, content: bytes, found: int, context: bytes = b"v1") -> None:
    recall.keep(tenant, recall.key(tenant, content, context), found)


def test_the_same_content_in_the_same_context_is_known_again() -> None:
    recall = Recall[int]()
    keep(recall, "a", b"text", 1)
    assert kept(recall, "a", b"text") == 1
    assert kept(recall, "a", b"other") is None
    assert kept(recall, "a", b"text", b"v2") is None, "other detectors, another key"


def test_no_tenant_knows_what_another_sent_and_their_keys_differ() -> None:
    recall = Recall[int]()
    keep(recall, "a", b"text", 1)
    assert kept(recall, "b", b"text") is None
    assert recall.key("a", b"text", b"") != recall.key("b", b"text", b"")
    assert Recall[int]().key("a", b"text", b"") != recall.key("a", b"text", b""), "nobody can compute a key"


def test_a_tenant_that_is_forgotten_has_another_key_afterwards() -> None:
    recall = Recall[int]()
    keep(recall, "a", b"text", 1)
    keep(recall, "b", b"text", 2)
    before = recall.key("a", b"text", b"")
    recall.forget("a")
    recall.forget("nobody")
    assert kept(recall, "a", b"text") is None
    assert recall.key("a", b"text", b"") != before
    assert kept(recall, "b", b"text") == 2
    recall.forget_all()
    assert kept(recall, "b", b"text") is None


def test_what_was_not_used_for_longest_goes_first() -> None:
    recall = Recall[int]()
    for number in range(MOST_KEPT):
        keep(recall, "a", b"%d" % number, number)
    assert kept(recall, "a", b"0") == 0
    keep(recall, "a", b"more", -1)
    assert kept(recall, "a", b"0") == 0
    assert kept(recall, "a", b"1") is None


def test_so_many_tenants_are_kept_and_no_more() -> None:
    recall = Recall[int]()
    for number in range(MOST_TENANTS + 1):
        keep(recall, str(number), b"text", number)
    assert kept(recall, str(MOST_TENANTS), b"text") == MOST_TENANTS
    assert len(recall._tenants) == MOST_TENANTS
