"""Only whole safetensors checkpoints of Qwen2.5-VL are found, by a name that errors repeat and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from models import DEMO, ModelNotFound, weights


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_a_directory_is_found_and_its_digest_is_over_names_and_contents(checkpoint: Path) -> None:
    found = weights.find(str(checkpoint))
    lines = [
        f"{name}\0{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert found.digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert found.directory == checkpoint


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_every_file_that_is_read_counts(checkpoint: Path, file: str) -> None:
    before = weights.find(str(checkpoint)).digest
    (checkpoint / "README.md").write_text("not read")
    assert weights.find(str(checkpoint)).digest == before
    (checkpoint / file).write_bytes((checkpoint / file).read_bytes() + b" ")
    assert weights.find(str(checkpoint)).digest != before


def test_a_known_hash_stands_for_its_file_and_no_other(checkpoint: Path) -> None:
    found = weights.find(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"replaced since")
    known = {"model.safetensors": found.hashes["model.safetensors"], "elsewhere.safetensors": "0" * 64}
    assert weights.find(str(checkpoint), known=known) == found
    (checkpoint / "config.json").write_text('{"model_type": "qwen2_5_vl" }')
    assert weights.find(str(checkpoint), known=known).digest != found.digest


def test_shards_are_those_of_the_index_and_of_this_directory(checkpoint: Path) -> None:
    assert weights.find(str(checkpoint)).weights() == [checkpoint / "model.safetensors"]
    (checkpoint / "model.safetensors").rename(checkpoint / "b.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    (checkpoint / "a.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="index"):
        weights.find(str(checkpoint)).weights()
    for shards, good in (
        (["b.safetensors", "a.safetensors", "b.safetensors"], True),
        (["../b.safetensors"], False),
        (["/etc/passwd"], False),
        (["tokenizer.json"], False),
        (["a.safetensors", "missing.safetensors"], False),
        ([7], False),
    ):
        index.write_text(json.dumps({"weight_map": {str(at): shard for at, shard in enumerate(shards)}}))
        if good:
            assert weights.find(str(checkpoint)).weights() == [
                checkpoint / "a.safetensors",
                checkpoint / "b.safetensors",
            ]
        else:
            with pytest.raises(ValueError, match="index"):
                weights.find(str(checkpoint)).weights()


def test_a_checkpoint_without_safetensors_is_none(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model.gguf")
    with pytest.raises(ModelNotFound, match="no safetensors"):
        weights.find(str(checkpoint))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(ModelNotFound, match=file):
        weights.find(str(checkpoint))


@pytest.mark.parametrize("config", ["{", '{"model_type": "llama"}', "[]"])
def test_another_kind_of_model_is_refused(checkpoint: Path, config: str) -> None:
    (checkpoint / "config.json").write_text(config)
    with pytest.raises(ModelNotFound):
        weights.find(str(checkpoint))


def test_a_broken_image_configuration_is_refused(checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not JSON"):
        weights.find(str(checkpoint))


@pytest.mark.parametrize(
    "name", ["", "no-such-model", "../../etc/passwd", "a/b/c", "https://example.org/m", "a/../b"]
)
def test_what_is_no_name_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_fetch", lambda name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(ModelNotFound):
        weights.find(name)


def test_only_safe_files_are_fetched_from_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, list[str]] = {}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert weights.find("vec-ai/lychee-rerank-mm").directory == checkpoint
    assert {Path(pattern).suffix for pattern in asked["vec-ai/lychee-rerank-mm"]} == {".safetensors", ".json"}


def test_errors_hold_no_path_but_the_name_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        raise OSError("/home/someone/.cache is not writable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound) as caught:
        weights.find("vec-ai/none")
    assert "/home" not in str(caught.value)
    monkeypatch.setattr(weights, "DEMO_DIRECTORY", tmp_path / "nowhere")
    with pytest.raises(ModelNotFound) as caught:
        weights.find(DEMO)
    assert str(tmp_path) not in str(caught.value)
