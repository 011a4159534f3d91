"""One copy of the weights, in memory that several processes map writable: placed, offered, borrowed, looked after."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Item, Job, ModelFailed, lending, sealed_memory, weights
from models.cuda_memory import HANDLE_BYTES, PAGE_BYTES, CudaError, CudaRuntime
from models.lending import (
    ALIGNMENT_BYTES,
    BorrowedWeights,
    LentWeights,
    NotShareable,
    fingerprint,
    is_slice,
    lend,
    open_gpu,
)
from models.loading import load_model
from models.qwen import QwenReranker
from models.stock import Qwen2_5_VLForConditionalGeneration
from tests.cuda_stub import COMPILER, build, memories, open_stub
from tests.tiny_qwen import make_config, make_tokenizer, save_checkpoint

CPU = torch.device("cpu")
TENSORS = {
    "a": torch.arange(77.0),
    "b": torch.randn(3, 5),
    "c": torch.tensor(2.5),
    "d": torch.randn(40, 2000),
}
HASHES = {"model.safetensors": "ab" * 32}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return build(tmp_path)


@pytest.fixture
def cuda(library: Path) -> CudaRuntime:
    return open_stub(library)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("offer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


def forge(memory: int, **changes: Any) -> int:
    """An offer like that in `memory`, but for `changes`, sealed too."""
    told = json.loads(os.pread(memory, 1 << 20, 0)) | changes
    forged = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(forged, json.dumps(told).encode())
    sealed_memory.seal(forged)
    return forged


@pytest.mark.skipif(COMPILER is None, reason="no C compiler to build the CUDA stub with")
class TestLending:
    def test_what_is_borrowed_is_what_was_lent(self, cuda: CudaRuntime, memory: int) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            offer = os.memfd_create("offer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            LentWeights(TENSORS, dtype, HASHES, cuda).offer(offer)
            borrowed = BorrowedWeights(offer, cuda)
            os.close(offer)
            assert borrowed.hashes() == HASHES
            got = borrowed.tensors(dtype)
            assert list(got) == list(TENSORS)
            for name, tensor in got.items():
                assert tensor.dtype == dtype and tensor.shape == TENSORS[name].shape
                assert torch.equal(tensor, TENSORS[name].to(dtype))
                assert tensor.data_ptr() % ALIGNMENT_BYTES == 0

    def test_the_memory_is_whole_pages_and_holds_nothing_else(
        self, cuda: CudaRuntime, tmp_path: Path
    ) -> None:
        lent = LentWeights(TENSORS, torch.float32, HASHES, cuda)
        (held,) = memories(tmp_path)
        whole = held.read_bytes()
        assert len(whole) == lent.size_bytes == PAGE_BYTES
        gaps = bytearray(whole)
        for name, place in lent._offer.table.items():
            end = place.end(torch.float32)
            assert whole[place.start : end] == TENSORS[name].numpy().tobytes()
            gaps[place.start : end] = bytes(end - place.start)
        assert not any(gaps), "what was there before is gone"

    def test_a_piece_is_copied_and_checked_at_a_time(
        self, cuda: CudaRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lending, "PIECE_BYTES", 4096)
        lent = LentWeights(TENSORS, torch.bfloat16, HASHES, cuda)
        place = lent._offer.table["d"]
        assert torch.equal(place.view(lent._block, torch.bfloat16), TENSORS["d"].bfloat16())
        assert lent.intact()

    def test_any_change_is_found_and_none_imagined(self, cuda: CudaRuntime, tmp_path: Path) -> None:
        lent = LentWeights(TENSORS, torch.bfloat16, HASHES, cuda)
        (held,) = memories(tmp_path)
        whole = held.read_bytes()
        swapped = whole[4:8] + whole[:4] + whole[8:]
        for place in (0, 1, 3, 160_007, lent.size_bytes - 1):  # the last one is in no tensor
            for bit in (0, 7):
                assert lent.intact()
                tamper(held, place, bytes([whole[place] ^ 1 << bit]))
                assert not lent.intact()
                tamper(held, place, whole[place : place + 1])
        assert lent.intact()
        tamper(held, 0, swapped[:8])
        assert not lent.intact()

    def test_who_knows_the_offer_cannot_make_a_change_that_evens_out(
        self, cuda: CudaRuntime, tmp_path: Path, memory: int
    ) -> None:
        """Under the offer's own keys a change can be computed that leaves its fingerprint alone; the owner sees it."""
        lent = LentWeights(TENSORS, torch.float32, HASHES, cuda)
        lent.offer(memory)
        (held,) = memories(tmp_path)
        seed = bytes.fromhex(json.loads(os.pread(memory, 1 << 20, 0))["seed"])
        block = torch.frombuffer(bytearray(held.read_bytes()), dtype=torch.uint8)
        changed = even_out(block, seed)
        assert not torch.equal(changed, block)
        assert fingerprint(changed, seed) == fingerprint(block, seed)
        tamper(held, 0, changed.numpy().tobytes())
        BorrowedWeights(memory, cuda)  # none the wiser
        assert not lent.intact()

    def test_an_offer_that_is_no_longer_true_is_refused(
        self, cuda: CudaRuntime, tmp_path: Path, memory: int
    ) -> None:
        LentWeights(TENSORS, torch.float32, HASHES, cuda).offer(memory)
        tamper(memories(tmp_path)[0], 5, b"\x00\x01\x02")
        with pytest.raises(ModelFailed, match="not what was offered"):
            BorrowedWeights(memory, cuda)

    def test_an_offer_is_sealed_and_one_that_is_not_is_refused(self, cuda: CudaRuntime, memory: int) -> None:
        lent = LentWeights(TENSORS, torch.float32, HASHES, cuda)
        with pytest.raises(ModelFailed, match="not sealed"):
            BorrowedWeights(memory, cuda)
        lent.offer(memory)
        for attempt in (lambda: os.pwrite(memory, b"x", 0), lambda: os.ftruncate(memory, 0)):
            with pytest.raises(PermissionError):
                attempt()
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, 0)

    @pytest.mark.parametrize(
        "changes",
        [
            {"handle": "00" * (HANDLE_BYTES - 1)},
            {"handle": 5},
            {"size_bytes": PAGE_BYTES + 1},
            {"size_bytes": 0},
            {"dtype": "I8"},
            {"table": {"a": [0, [PAGE_BYTES]]}},
            {"table": {"a": [-256, [1]]}},
            {"table": {"a": [4, [1]]}},
            {"table": {"a": [0, [-1]]}},
            {"table": {"a": [0]}},
            {"table": None},
            {"seed": "x"},
        ],
        ids=str,
    )
    def test_an_offer_that_makes_no_sense_is_refused(
        self, cuda: CudaRuntime, memory: int, changes: dict[str, Any]
    ) -> None:
        LentWeights(TENSORS, torch.float32, HASHES, cuda).offer(memory)
        forged = forge(memory, **changes)
        with pytest.raises(ModelFailed, match="cannot be read"):
            BorrowedWeights(forged, cuda)
        os.close(forged)

    def test_another_dtype_than_asked_for_is_refused(self, cuda: CudaRuntime, memory: int) -> None:
        LentWeights(TENSORS, torch.float32, HASHES, cuda).offer(memory)
        with pytest.raises(ModelFailed, match="another dtype"):
            BorrowedWeights(memory, cuda).tensors(torch.bfloat16)

    def test_tensors_of_integers_are_refused(self, cuda: CudaRuntime) -> None:
        with pytest.raises(ModelFailed, match="floating point"):
            LentWeights({"a": torch.arange(3)}, torch.float32, HASHES, cuda)

    @pytest.mark.parametrize(
        ("trouble", "error", "text"),
        [
            ("no-room", ModelFailed, r"no room: cudaMalloc: out of memory \(2\)"),
            ("crooked", ModelFailed, "no room: cudaMalloc: .* page of its own"),
            ("no-export", NotShareable, r"cudaIpcGetMemHandle: operation not supported \(801\)"),
        ],
    )
    def test_what_the_device_cannot_do_is_told(
        self,
        cuda: CudaRuntime,
        library: Path,
        tmp_path: Path,
        trouble: str,
        error: type[Exception],
        text: str,
    ) -> None:
        (tmp_path / trouble).touch()
        with pytest.raises(error, match=text):
            LentWeights(TENSORS, torch.float32, HASHES, cuda)
        assert ctypes.CDLL(str(library)).cudaGetLastError() == 0, (
            "torch would have thrown it at the next kernel"
        )

    def test_a_device_that_is_not_there_is_told(self, library: Path) -> None:
        with pytest.raises(CudaError, match="cudaSetDevice: invalid device ordinal"):
            open_stub(library, 3)

    def test_sizes_that_are_no_pages_are_a_bug(self, cuda: CudaRuntime) -> None:
        for size in (0, -PAGE_BYTES, PAGE_BYTES + 1):
            with pytest.raises(ValueError, match="whole number of pages"):
                cuda.allocate(size)

    def test_the_stock_model_takes_borrowed_parameters_as_they_are(
        self, cuda: CudaRuntime, directory: Path, memory: int
    ) -> None:
        checkpoint = weights.find(str(directory))
        lend(checkpoint, torch.bfloat16, cuda).offer(memory)
        borrowed = BorrowedWeights(memory, cuda)
        model = load_model(checkpoint, CPU, torch.bfloat16, shared=borrowed)
        stock = load_model(checkpoint, CPU, torch.bfloat16)
        for of in ("named_parameters", "named_buffers"):
            got, wanted = dict(getattr(model, of)()), dict(getattr(stock, of)())
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], wanted[name]) for name in got)
        assert not model.training and not any(each.requires_grad for each in model.parameters())
        block = borrowed._block
        memory_of = range(block.data_ptr(), block.data_ptr() + block.nbytes)
        assert all(parameter.data_ptr() in memory_of for parameter in model.parameters())

    def test_a_tied_head_stays_the_embedding(self, cuda: CudaRuntime, tmp_path: Path, memory: int) -> None:
        tokenizer = make_tokenizer()
        config: Any = make_config(tokenizer)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        directory = tmp_path / "tied"  # a folder of a model holds nothing else
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(directory)
        tokenizer.save(str(directory / "tokenizer.json"))
        checkpoint = weights.find(str(directory))
        lend(checkpoint, torch.float32, cuda).offer(memory)
        model: Any = load_model(checkpoint, CPU, torch.float32, shared=BorrowedWeights(memory, cuda))
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight

    def test_lent_weights_that_are_another_models_are_refused(
        self, cuda: CudaRuntime, directory: Path, memory: int
    ) -> None:
        LentWeights(TENSORS, torch.float32, HASHES, cuda).offer(memory)
        with pytest.raises(ModelFailed, match=r"not whole|cannot be loaded"):
            load_model(weights.find(str(directory)), CPU, torch.float32, shared=BorrowedWeights(memory, cuda))

    def test_a_reranker_borrows_or_says_why_not(
        self, cuda: CudaRuntime, directory: Path, memory: int, tmp_path: Path
    ) -> None:
        job = Job(Item("red shoe"), (Item("a red shoe"), Item("something else")))
        own = QwenReranker.load(str(directory), device="cpu", dtype="fp32")
        lend(weights.find(str(directory)), torch.float32, cuda).offer(memory)
        lent = QwenReranker.load(str(directory), device="cpu", dtype="fp32", offer=memory, cuda=cuda)
        assert (own.card.weights, lent.card.weights, lent.card.unlent) == ("own", "lent", None)
        assert lent.card.digest == own.card.digest
        assert lent.score(job).margins == own.score(job).margins
        (tmp_path / "no-open").touch()
        refused = QwenReranker.load(str(directory), device="cpu", dtype="fp32", offer=memory, cuda=cuda)
        assert refused.card.weights == "own"
        assert refused.card.unlent == "cudaIpcOpenMemHandle: mapping of buffer object failed (205)"
        assert refused.score(job).margins == own.score(job).margins

    def test_another_process_sees_the_same_memory(
        self, cuda: CudaRuntime, library: Path, memory: int
    ) -> None:
        """It writes there, because CUDA lets it; the owner finds out."""
        lent = LentWeights(TENSORS, torch.float32, HASHES, cuda)
        lent.offer(memory)
        script = """
import sys, torch
from models.lending import BorrowedWeights
from tests.cuda_stub import open_stub
tensors = BorrowedWeights(int(sys.argv[1]), open_stub(sys.argv[2])).tensors(torch.float32)
print(tensors["a"].sum().item())
tensors["b"][1, 2] += 1
"""
        told = subprocess.run(
            [sys.executable, "-c", script, str(memory), str(library)],
            pass_fds=[memory],
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(told.stdout) == TENSORS["a"].sum().item()
        assert not lent.intact()


def tamper(held: Path, place: int, data: bytes) -> None:
    with held.open("r+b") as file:
        file.seek(place)
        file.write(data)


def even_out(block: Tensor, seed: bytes) -> Tensor:
    """`block` with four other words, and the same fingerprint under `seed`.

    Zeros become -2^31: that cancels out where the sum of their keys is a multiple of 2^33, and among the sums of pairs
    of 900 keys there are two that add up to one.
    """
    words = block.view(torch.int32).clone()
    keys = torch.frombuffer(bytearray(hashlib.shake_256(seed).digest(8 * len(words))), dtype=torch.int64)
    few = dict(enumerate(keys.tolist()[-900:], len(words) - 900))
    assert not words[-900:].any()
    seen: dict[int, tuple[int, int]] = {}
    for pair in combinations(few, 2):
        total = (few[pair[0]] + few[pair[1]]) % (1 << 33)
        other = seen.get(-total % (1 << 33), pair)
        if not set(other) & set(pair):
            words[[*pair, *other]] = -(1 << 31)
            return words.view(torch.uint8)
        seen[total] = pair
    raise AssertionError("no such four words")


@pytest.mark.parametrize(
    ("visible", "name", "slice_"),
    [
        ("", "NVIDIA H100 80GB HBM3", False),
        ("0,1", "NVIDIA A100-SXM4-40GB", False),
        ("GPU-5d3a", "NVIDIA A100-SXM4-40GB", False),
        ("MIG-1f3c", "whatever", True),
        ("", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", True),
    ],
)
def test_a_slice_of_a_gpu_is_known_by_its_names(visible: str, name: str, slice_: bool) -> None:
    assert is_slice(visible, name) is slice_


def test_without_a_gpu_nothing_can_be_shared() -> None:
    with pytest.raises(NotShareable, match="no CUDA device"):
        open_gpu("cpu")
    with pytest.raises(CudaError, match="built without CUDA"):
        CudaRuntime.of_torch(None, 0)
    with pytest.raises(CudaError, match=r"libcudart.so.999 cannot be used"):
        CudaRuntime.of_torch("999.9", 0)
