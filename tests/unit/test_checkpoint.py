"""Checkpoints, cosignatures and proofs as text: one way to write each, and no other is read."""

from __future__ import annotations

from base64 import b64decode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenants.checkpoint import Checkpoint, Cosigner, Proof, Signer, VerifyKey, open_checkpoint, split_note
from tenants.errors import ProofInvalid

SIGNER = Signer("log.example/one", bytes(range(32)))
WITNESS = Cosigner("witness.example/w", bytes(range(1, 33)))
CHECKPOINT = Checkpoint("log.example/one", 7, b"r" * 32)
NOTE = SIGNER.sign(CHECKPOINT)

# The example of C2SP signed-note (CC BY 4.0): text, key and signature were made by another program.
NOTE_TEXT = "Ognuno sta solo sul cuor della terra\ntrafitto da un raggio di sole:\n\ned è subito sera.\n"
NOTE_SIGNED = (
    f"{NOTE_TEXT}\n— quasimodo.example/salvatore "
    "NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=\n"
)

# The example key of golang.org/x/mod/sumdb/note, a program that others wrote: name, id and public key belong together.
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_NOTE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
    "\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)


def test_keys_and_signatures_of_another_program_are_read_and_hold() -> None:
    key = VerifyKey.parse(PETER)
    assert (key.name, key.id.hex(), key.text) == ("PeterNeumann", "c74f20a3", PETER)
    text, (line,) = split_note(PETER_NOTE)
    signature = line.split(" ")[2]
    assert key.verify(b64decode(signature)[4:], text) is None
    with pytest.raises(ProofInvalid):
        key.verify(b64decode(signature)[4:], text.replace("answer", "Answer"))


def test_a_text_with_empty_lines_ends_at_the_last_one() -> None:
    text, lines = split_note(NOTE_SIGNED)
    assert text == NOTE_TEXT
    assert len(lines) == 1


def test_a_checkpoint_says_what_was_signed() -> None:
    opened = open_checkpoint(NOTE, [SIGNER.key, WITNESS.key], origin="log.example/one")
    assert opened.checkpoint == CHECKPOINT
    assert opened.signers == (SIGNER.key,)
    assert VerifyKey.parse(SIGNER.key.text) == SIGNER.key


def test_a_cosignature_adds_its_time() -> None:
    both = NOTE + WITNESS.cosign(CHECKPOINT, at_s=1_700_000_000)
    opened = open_checkpoint(both, [SIGNER.key, WITNESS.key], origin="log.example/one")
    assert opened.signers == (SIGNER.key, WITNESS.key)
    assert opened.times_s == (1_700_000_000,)


def test_a_witness_alone_does_not_speak_for_the_log() -> None:
    alone = f"{CHECKPOINT.text}\n{WITNESS.cosign(CHECKPOINT, at_s=1)}"
    assert open_checkpoint(alone, [WITNESS.key]).signers == (WITNESS.key,)
    with pytest.raises(ProofInvalid):
        open_checkpoint(alone, [SIGNER.key, WITNESS.key], origin="log.example/one")


def test_one_seed_in_two_roles_gives_no_signature_that_passes_for_the_other() -> None:
    log, witness = Signer("same.example", bytes(32)), Cosigner("same.example", bytes(32))
    checkpoint = Checkpoint("same.example", 1, bytes(32))
    with pytest.raises(ProofInvalid):
        open_checkpoint(log.sign(checkpoint), [witness.key])


def test_a_signature_of_a_known_key_that_does_not_hold_spoils_the_note() -> None:
    other = SIGNER.sign(Checkpoint("log.example/one", 8, b"r" * 32))
    forged = NOTE + other.rpartition("\n\n")[2]
    with pytest.raises(ProofInvalid):
        open_checkpoint(forged, [SIGNER.key])


def test_unknown_signers_are_passed_over_and_never_enough() -> None:
    stranger = Signer("log.example/one", bytes(31) + b"\1")
    both = NOTE + stranger.sign(CHECKPOINT).rpartition("\n\n")[2]
    assert open_checkpoint(both, [SIGNER.key]).signers == (SIGNER.key,)
    with pytest.raises(ProofInvalid):
        open_checkpoint(stranger.sign(CHECKPOINT), [SIGNER.key])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(NOTE) - 1), st.sampled_from(["drop", "double", "bit"]), st.integers(0, 6))
def test_no_other_text_passes_for_a_checkpoint(at: int, how: str, bit: int) -> None:
    changed = {
        "drop": NOTE[:at] + NOTE[at + 1 :],
        "double": NOTE[:at] + NOTE[at] * 2 + NOTE[at + 1 :],
        "bit": NOTE[:at] + chr(ord(NOTE[at]) ^ (1 << bit)) + NOTE[at + 1 :],
    }[how]
    if changed == NOTE:
        return
    with pytest.raises(ProofInvalid):
        open_checkpoint(changed, [SIGNER.key], origin="log.example/one")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "log.example/one\n7\n",
        f"log.example/one\n07\n{'A' * 43}=\n",
        f"log.example/one\n-1\n{'A' * 43}=\n",
        f"log.example/one\n9223372036854775808\n{'A' * 43}=\n",
        f"log.example/one\n٧\n{'A' * 43}=\n",
        f"log.example/one\n7\n{'A' * 42}B=\n",
        f"log.example/one\n7\n{'A' * 40}\n",
        f"log.example/one\n7\n{'A' * 43}=\nmore\n",
        f"log example\n7\n{'A' * 43}=\n",
        f"log.example/one\n7\n{'A' * 43}=",
    ],
)
def test_a_checkpoint_that_is_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ProofInvalid):
        Checkpoint.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "a+b", "a+00000000+AAAA", f"{PETER} ", PETER.replace("c74f20a3", "c74f20a4"), PETER.upper()],
)
def test_a_key_whose_parts_do_not_belong_together_is_refused(text: str) -> None:
    with pytest.raises(ProofInvalid):
        VerifyKey.parse(text)


@given(
    st.integers(0, 2**62),
    st.lists(st.binary(min_size=32, max_size=32), max_size=8),
    st.binary(max_size=200),
)
def test_a_proof_reads_back_equal(index: int, nodes: list[bytes], extra: bytes) -> None:
    proof = Proof(index, tuple(nodes), NOTE, extra)
    assert Proof.parse(proof.text) == proof


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tlog-proof@v1", "tlog-proof@v2"),
        ("index 3", "index 03"),
        ("index 3\n", ""),
        ("extra eA==", "extra eB=="),
        ("\n\n", "\n"),
        ("index 3\n", f"index 3\n{'A' * 40}\n"),
        ("index 3\n", "index 3\n" + f"{'A' * 43}=\n" * 64),
    ],
)
def test_a_proof_that_is_written_otherwise_is_refused(old: str, new: str) -> None:
    text = Proof(3, (bytes(32),), NOTE, b"x").text
    assert Proof.parse(text)
    with pytest.raises(ProofInvalid):
        Proof.parse(text.replace(old, new, 1))


def test_another_text_is_signed_and_can_pass_for_no_checkpoint() -> None:
    signer = Signer("example.com/log", bytes(range(32)))
    note = signer.sign_text("pericarp-incident/v1\nexample.com/log\n")
    text, lines = split_note(note)
    assert (text, len(lines)) == ("pericarp-incident/v1\nexample.com/log\n", 1)
    with pytest.raises(ProofInvalid, match="three lines"):
        open_checkpoint(note, [signer.key])
    for bad in (
        Checkpoint("example.com/log", 1, bytes(32)).text,
        "no end",
        "two\n\nparts\n",
        "example.com/log\n",
    ):
        with pytest.raises(ValueError):
            signer.sign_text(bad)
