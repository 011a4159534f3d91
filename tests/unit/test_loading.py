"""Weights are mapped, shared and unalterable; a checkpoint that is not whole, or not a model's own, gives no model."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import ModelFailed, weights
from models.loading import load_model
from models.sealing import SealedWeights
from models.stock import Qwen2_5_VLForConditionalGeneration
from models.tensors import native_dtype
from tests.tiny_qwen import make_config, make_tokenizer, save_checkpoint

CPU = torch.device("cpu")
FILE = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))  # its weights are fp32


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    yield descriptor
    os.close(descriptor)


def load(
    directory: Path, dtype: torch.dtype = torch.float32, memory: int | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    shared = None if memory is None else SealedWeights(memory)
    known = {} if shared is None else shared.hashes()
    return load_model(weights.find(str(directory), known=known), CPU, dtype, shared=shared)


def contents(model: Any) -> dict[str, Tensor]:
    """Every parameter and every buffer, those too that are in no file."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal(model: Any, expected: Any) -> None:
    got, wanted = contents(model), contents(expected)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) and got[name].dtype == wanted[name].dtype for name in got)


def mappings(of: str) -> dict[range, dict[str, int]]:
    """Live mappings of files whose path begins with `of`: addresses -> fields of /proc/self/smaps in KiB."""
    found: dict[range, dict[str, int]] = {}
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split(maxsplit=5)
        if not name.endswith(":"):
            start, end = (int(address, 16) for address in name.split("-"))
            fields = {"private": int(rest[0][3] == "p")}
            if rest[4:] and rest[4].startswith(of):
                found[range(start, end)] = fields
        elif rest[1:] == ["kB"]:
            fields[name[:-1]] = int(rest[0])
    return found


def assert_mapped(model: Any, of: str) -> None:
    """Every parameter lies in a private mapping of `of`, not one page of which has become this process's own."""
    maps = mappings(of)
    for name, parameter in model.named_parameters():
        assert parameter.sum().isfinite()  # each page is touched
        assert any(parameter.data_ptr() in addresses for addresses in maps), f"{name} is a copy"
    for fields in mappings(of).values():
        assert fields["private"]
        assert fields["Anonymous"] == 0


def assert_shared_by_two(of: str, size_bytes: int) -> None:
    """Two mappings of `of`, each whole in memory, and each page counted half for either."""
    gc.collect()  # the models of tests before
    maps = mappings(of).values()
    assert len(maps) == 2
    resident_kib, fair_kib = (sum(fields[field] for fields in maps) for field in ("Rss", "Pss"))
    assert resident_kib * 1024 >= 2 * size_bytes
    assert fair_kib < resident_kib * 0.51


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
        ({"neon": True, "bf16": False}, "fp32"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_it_need_not_emulate_it(
    capabilities: dict[str, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_dtype(CPU) == dtype
    assert native_dtype(torch.device("cuda")) == "bf16"


def test_the_model_is_the_one_that_transformers_loads(directory: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        model = load(directory, dtype)
        assert_equal(model, stock)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        config: Any = model.config
        assert config.text_config._attn_implementation == "sdpa"
        assert config.vision_config._attn_implementation == "sdpa"


def test_parameters_are_views_of_the_files_pages_and_share_them(directory: Path) -> None:
    before = (directory / FILE).read_bytes()
    models = [load(directory), load(directory)]
    for model in models:
        assert_mapped(model, str(directory / FILE))
    assert_shared_by_two(str(directory / FILE), len(before))
    # A write stays with who wrote it.
    ours, theirs = (next(iter(model.parameters())) for model in models)
    original = theirs.clone()
    ours.zero_()
    assert torch.equal(theirs, original)
    assert (directory / FILE).read_bytes() == before


def test_shards_make_the_same_model(directory: Path, copy: Path) -> None:
    whole = load(directory)
    (copy / FILE).unlink()
    whole.save_pretrained(copy, max_shard_size="200KB")
    assert len(weights.find(str(copy)).weights()) > 2
    sharded = load(copy)
    assert_equal(sharded, whole)
    assert_mapped(sharded, str(copy))
    shard, other = weights.find(str(copy)).weights()[:2]
    save_file(load_file(shard) | load_file(other), other, metadata={"format": "pt"})
    with pytest.raises(ModelFailed, match="cannot be loaded"):  # one tensor, two places
        load(copy)
    shard.unlink()
    with pytest.raises(ModelFailed, match="cannot be loaded"):
        load(copy)


def test_a_tied_head_is_the_embedding(tmp_path: Path, memory: int) -> None:
    tokenizer = make_tokenizer()
    config: Any = make_config(tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "lm_head.weight" not in load_file(tmp_path / FILE)
    for model in (load(tmp_path), load(tmp_path, torch.bfloat16, memory)):
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(next(name for name in tensors if "up_proj" in name)),
        lambda tensors: tensors.pop("lm_head.weight"),
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 64)}),
        lambda tensors: tensors.update({"model.language_model.extra.weight": torch.zeros(64)}),
    ],
    ids=["missing", "no head", "another shape", "unexpected"],
)
def test_weights_that_are_not_the_models_are_refused(
    copy: Path, memory: int, change: Callable[[dict[str, Tensor]], object]
) -> None:
    edit(copy, change)
    for each in (None, memory):
        with pytest.raises(ModelFailed, match=r"not whole|cannot be loaded"):
            load(copy, memory=each)


def test_a_damaged_file_is_refused(copy: Path) -> None:
    whole = (copy / FILE).read_bytes()
    for damaged in (b"no header", whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]):
        (copy / FILE).write_bytes(damaged)
        with pytest.raises(ModelFailed, match="cannot be loaded"):
            load(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_weights_are_converted_once_and_mapped_by_all(
    directory: Path, memory: int, dtype: torch.dtype
) -> None:
    own = load(directory, dtype)
    shared = [load(directory, dtype, memory) for _ in range(2)]
    for model in shared:
        assert_equal(model, own)
        assert_mapped(model, "/memfd:weights")
        for name, parameter in model.named_parameters():
            assert parameter.nbytes % 64 or parameter.data_ptr() % 64 == 0, f"{name} is not aligned"
    assert_shared_by_two("/memfd:weights", sum(parameter.nbytes for parameter in own.parameters()))


def test_nobody_can_change_sealed_weights(directory: Path, memory: int) -> None:
    """Whatever a worker may try that has been taken over, on the descriptor it once held or one that it opens anew."""
    model = load(directory, memory=memory)
    sealed = os.pread(memory, 1 << 30, 0)
    anew = os.open(f"/proc/self/fd/{memory}", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    punch_hole, madv_remove = 0x1 | 0x2, 9
    size = ctypes.c_long(4096)
    for descriptor in (memory, anew):
        for attempt in (
            partial(os.pwrite, descriptor, b"x", 100),
            partial(os.pwrite, descriptor, b"x", len(sealed)),
            partial(os.ftruncate, descriptor, 0),
            partial(os.ftruncate, descriptor, len(sealed) + 1),
            partial(os.posix_fallocate, descriptor, 0, len(sealed) + 1),
            partial(mmap.mmap, descriptor, len(sealed), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            partial(fcntl.fcntl, descriptor, fcntl.F_ADD_SEALS, 0),
        ):
            with pytest.raises(PermissionError):
                attempt()
        assert libc.fallocate(descriptor, punch_hole, ctypes.c_long(0), size) == -1
    os.close(anew)
    # Not through the mapping either: the kernel frees no page under it, and a write makes a page of our own.
    parameter = model.lm_head.weight
    page = ctypes.c_void_p(parameter.data_ptr() // 4096 * 4096)
    assert libc.madvise(page, size, madv_remove) == -1
    parameter.fill_(1.0)
    assert os.pread(memory, 1 << 30, 0) == sealed
    assert_equal(load(directory, memory=memory), load(directory))


def test_what_was_loaded_first_scores_whoever_changes_the_file(copy: Path, memory: int) -> None:
    model = load(copy, memory=memory)
    digest = weights.find(str(copy)).digest
    edit(copy, lambda tensors: tensors["lm_head.weight"].zero_())
    assert weights.find(str(copy)).digest != digest
    assert weights.find(str(copy), known=SealedWeights(memory).hashes()).digest == digest
    assert_equal(load(copy, memory=memory), model)


def test_memory_of_another_model_or_dtype_is_refused(directory: Path, copy: Path, memory: int) -> None:
    load(directory, memory=memory)
    edit(copy, lambda tensors: tensors["lm_head.weight"].zero_())
    for other, dtype in ((copy, torch.float32), (directory, torch.bfloat16)):
        with pytest.raises(ModelFailed, match="cannot be loaded"):
            load_model(weights.find(str(other)), CPU, dtype, shared=SealedWeights(memory))


def test_on_another_device_nobody_can_fill_it_later(directory: Path, memory: int) -> None:
    shared = SealedWeights(memory)
    load_model(weights.find(str(directory)), torch.device("meta"), torch.float32, shared=shared)
    assert (shared.sealed, shared.hashes()) == (True, {})
    with pytest.raises(ModelFailed, match="cannot be loaded"):
        load(directory, memory=memory)


def test_what_a_dying_process_left_is_written_anew(directory: Path, memory: int) -> None:
    os.write(memory, b"half of " * 1_000_000)
    shared = SealedWeights(memory)
    assert (shared.sealed, shared.hashes()) == (False, {})
    assert_equal(load(directory, memory=memory), load(directory))


def test_where_memory_runs_out_it_is_empty_again_and_the_next_one_tries(directory: Path, memory: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ModelFailed, match="cannot be loaded"):
            load(directory, memory=memory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.fstat(memory).st_size == 0
    load(directory, memory=memory)
    assert SealedWeights(memory).sealed


def test_a_tensor_of_integers_is_refused(copy: Path, memory: int) -> None:
    edit(copy, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, dtype=torch.int8)}))
    with pytest.raises(ModelFailed, match="cannot be loaded"):
        load(copy, memory=memory)
    assert not SealedWeights(memory).sealed


def test_processes_that_start_at_once_agree_on_one_memory(directory: Path, memory: int) -> None:
    script = """
import json, sys, torch
from models import weights
from models.loading import load_model
from models.sealing import SealedWeights
model = load_model(weights.find(sys.argv[1]), torch.device("cpu"), torch.bfloat16, shared=SealedWeights(int(sys.argv[2])))
print(json.dumps({name: each.double().sum().item() for name, each in model.named_parameters()}))
"""
    command = [sys.executable, "-c", script, str(directory), str(memory)]
    workers = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            pass_fds=[memory],
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    sums = [json.loads(worker.communicate()[0]) for worker in workers]
    assert sums[0] == sums[1]
    assert sums[0] == {
        name: each.double().sum().item() for name, each in load(directory, torch.bfloat16).named_parameters()
    }
    assert SealedWeights(memory).sealed
