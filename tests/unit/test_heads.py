"""Heads are read from a folder, or refused with the file's name; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from service.screening.heads import BadHead, read_heads
from service.screening.nets import FEATURE_COUNT
from tenants.risk import Category

NAMED = {"name": "rifles", "category": "weapons", "licence": "own"}


def tensors(**changed: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "weight": random.normal(0, 1, FEATURE_COUNT).astype(np.float32),
        "bias": np.array([0.25], np.float32),
        **changed,
    }


def test_a_head_is_read_with_what_names_it(tmp_path: Path) -> None:
    kept = tensors(
        mean=np.full(FEATURE_COUNT, 0.5, np.float32), scale=np.full(FEATURE_COUNT, 4.0, np.float32)
    )
    save_file(kept, tmp_path / "a.safetensors", metadata=NAMED)
    (head,) = read_heads(tmp_path)
    assert (head.name, head.category, head.licence, len(head.sha256)) == (
        "rifles",
        Category.WEAPONS,
        "own",
        64,
    )
    features = np.random.default_rng(1).normal(0, 1, (2, FEATURE_COUNT)).astype(np.float32)
    logits = (features - 0.5) / 4.0 @ kept["weight"] + 0.25
    assert head.judge(features).score == pytest.approx(1 / (1 + np.exp(-logits.max())), rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, {**NAMED, "name": "open_nsfw"}),
        ({}, {**NAMED, "name": "Not a name"}),
        ({}, {**NAMED, "category": "nonsense"}),
        ({}, {"name": "rifles", "category": "weapons"}),
        ({"weight": np.zeros(7, np.float32)}, NAMED),
        ({"weight": np.full(FEATURE_COUNT, np.nan, np.float32)}, NAMED),
        ({"weight": np.zeros(FEATURE_COUNT, np.float64)}, NAMED),
        ({"bias": np.zeros(2, np.float32)}, NAMED),
        ({"scale": np.zeros(FEATURE_COUNT, np.float32)}, NAMED),
        ({"other": np.zeros(1, np.float32)}, NAMED),
        ({"other": np.zeros(20_000, np.float32)}, NAMED),
    ],
)
def test_a_file_that_is_no_head_is_named(
    tmp_path: Path, changed: dict[str, np.ndarray], named: dict[str, str]
) -> None:
    save_file(tensors(**changed), tmp_path / "wrong.safetensors", metadata=named)
    with pytest.raises(BadHead, match=r"wrong\.safetensors"):
        read_heads(tmp_path)


def test_noise_is_no_head(tmp_path: Path) -> None:
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(200)))
    with pytest.raises(BadHead, match=r"noise\.safetensors"):
        read_heads(tmp_path)


def test_an_empty_folder_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadHead, match="0 safetensors files"):
        read_heads(tmp_path)
    for name in ("a", "b"):
        save_file(tensors(), tmp_path / f"{name}.safetensors", metadata=NAMED)
    with pytest.raises(BadHead, match="the same name"):
        read_heads(tmp_path)
