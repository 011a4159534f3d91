"""Our pass through the vision tower gives the stock tower's features, whatever images go through together."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from models import ModelFailed, Pixels
from models.images import ImagePreparer, Patches
from models.stock import Qwen2_5_VLForConditionalGeneration
from models.tower import Tower
from models.weights import DEMO_DIRECTORY
from tests.tiny_qwen import make_config, make_tokenizer

TOLERANCE = 2e-5  # of the largest feature, in fp32
MOST_PIXELS = 28 * 28 * 60


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Qwen2_5_VLForConditionalGeneration:
    """Windows of 2 x 2 tokens, one windowed block and one whole."""
    return make_tiny()


@pytest.fixture(scope="module")
def demo() -> Qwen2_5_VLForConditionalGeneration:
    return load_demo(torch.float32)


@pytest.fixture(scope="module")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> ImagePreparer:
    """Of a checkpoint with colours of its own, and images of 60 visual tokens at most."""
    directory = tmp_path_factory.mktemp("preprocessor")
    declared = {"max_pixels": MOST_PIXELS, "image_mean": [0.1, 0.5, 0.7], "image_std": [0.4, 0.2, 0.3]}
    (directory / "preprocessor_config.json").write_text(json.dumps(declared))
    return ImagePreparer.load(directory, patch=14, merge=2, temporal_patch=2)


def make_tiny(**vision: Any) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config: Any = make_config(make_tokenizer())
    for name, value in vision.items():
        assert hasattr(config.vision_config, name)
        setattr(config.vision_config, name, value)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    tiny: Qwen2_5_VLForConditionalGeneration = model.eval().requires_grad_(False)
    return tiny


def load_demo(dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(DEMO_DIRECTORY, dtype=dtype)
    demo: Qwen2_5_VLForConditionalGeneration = model.eval().requires_grad_(False)
    return demo


def picture(rng: random.Random, rows: int, columns: int) -> Pixels:
    """Noise of `rows * columns` visual tokens."""
    return Pixels(28 * columns, 28 * rows, rng.randbytes(28 * 28 * rows * columns * 3))


def pictures(rng: random.Random, count: int) -> list[Pixels]:
    sides = [(rng.randint(2, 7), rng.randint(2, 7)) for _ in range(count)]
    return [picture(rng, rows, columns) for rows, columns in sides]


def stock_features(
    model: Qwen2_5_VLForConditionalGeneration, images: Sequence[Patches]
) -> tuple[Tensor, ...]:
    values = torch.cat([each.values for each in images])
    grids = torch.tensor([each.patch_grid for each in images])
    features: tuple[Tensor, ...] = model.get_image_features(values, grids).pooler_output
    return features


def assert_alike(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert [each.shape for each in got] == [each.shape for each in wanted]
    scale = max(each.abs().max() for each in wanted)
    assert all((a - b).abs().max() <= TOLERANCE * scale for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_features_are_the_stock_towers(
    tiny: Qwen2_5_VLForConditionalGeneration, preparer: ImagePreparer, seed: int
) -> None:
    """Odd sides leave windows at the edges that are narrower, lower or both; equal images share their batches."""
    rng = random.Random(seed)
    images = [preparer.prepare(each) for each in pictures(rng, rng.choice([1, 2, 7]))]
    images += images[: rng.choice([0, 1])]
    assert_alike(Tower(tiny, preparer.colours).see(images), stock_features(tiny, images))


@pytest.mark.parametrize(
    "sides", [[(4, 4)] * 3, [(2, 8)], [(4, 4), (1, 16), (2, 3), (4, 4), (16, 1), (2, 2)]]
)
def test_the_demo_models_features_are_the_stock_towers(
    demo: Qwen2_5_VLForConditionalGeneration, sides: list[tuple[int, int]]
) -> None:
    """One window to an image, two, and a mixture."""
    rng = random.Random(1)
    preparer = ImagePreparer.load(DEMO_DIRECTORY, patch=14, merge=2, temporal_patch=2)
    images = [preparer.prepare(picture(rng, rows, columns)) for rows, columns in sides]
    assert [each.patch_grid for each in images] == [(1, 2 * rows, 2 * columns) for rows, columns in sides]
    assert_alike(Tower(demo, preparer.colours).see(images), stock_features(demo, images))


def test_an_image_is_seen_alike_in_any_company(
    tiny: Qwen2_5_VLForConditionalGeneration, preparer: ImagePreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = Tower(tiny, preparer.colours)
    images = [preparer.prepare(each) for each in pictures(random.Random(2), 6)]
    alone = [tower.see([each])[0] for each in images]
    assert_alike(tower.see(images), alone)
    assert_alike(tower.see(images[::-1])[::-1], alone)
    passes: list[int] = []
    see = Tower._see

    def counting(tower: Tower, batch: Sequence[Patches]) -> Iterator[Tensor]:
        passes.append(len(batch))
        return see(tower, batch)

    monkeypatch.setattr(Tower, "_see", counting)
    monkeypatch.setattr("models.tower.VISION_PATCHES", 100)
    assert_alike(tower.see(images), alone)
    assert len(passes) > 2 and sum(passes) == len(images)
    assert tower.see([]) == []


def test_features_kept_of_one_image_keep_no_others(
    tiny: Qwen2_5_VLForConditionalGeneration, preparer: ImagePreparer
) -> None:
    for images in ([(4, 4)] * 3, [(3, 5), (2, 2), (5, 3)]):
        prepared = [preparer.prepare(picture(random.Random(3), *sides)) for sides in images]
        for features in Tower(tiny, preparer.colours).see(prepared):
            assert features.untyped_storage().nbytes() == features.numel() * features.element_size()


def test_weights_are_read_where_they_are(preparer: ImagePreparer) -> None:
    """Not copied: what is changed in the stock modules after the tower was made is seen."""
    model = make_tiny()
    tower = Tower(model, preparer.colours)
    images = [preparer.prepare(each) for each in pictures(random.Random(4), 3)]
    before = tower.see(images)
    for block in model.model.visual.blocks:
        for module in (block.attn.qkv, block.attn.proj, block.mlp.gate_proj, block.mlp.up_proj, block.norm1):
            module.weight.mul_(1.5)
    after = tower.see(images)
    assert (after[0] - before[0]).abs().max() > 100 * TOLERANCE * before[0].abs().max()
    assert_alike(after, stock_features(model, images))


def test_several_threads_see_at_once(
    tiny: Qwen2_5_VLForConditionalGeneration, preparer: ImagePreparer
) -> None:
    tower = Tower(tiny, preparer.colours)
    work = [pictures(random.Random(seed), 1 + seed % 4) for seed in range(40)]

    def see(images: list[Pixels]) -> list[Tensor]:
        return tower.see([preparer.prepare(each) for each in images])

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(see, work))
    for images, features in zip(work, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(features, see(images), strict=True))


@pytest.mark.parametrize("precise_rows", [512, 0], ids=["short", "long"])
def test_bf16_features_are_closer_to_fp32_than_the_stock_towers(
    demo: Qwen2_5_VLForConditionalGeneration, precise_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both with attention in fp32 and, as over the many rows of a large image, in bf16."""
    monkeypatch.setattr("models.tower._PRECISE_ROWS", precise_rows)
    preparer = ImagePreparer.load(DEMO_DIRECTORY, patch=14, merge=2, temporal_patch=2)
    images = [preparer.prepare(each) for each in pictures(random.Random(5), 8)]
    small = load_demo(torch.bfloat16)
    exact = torch.cat(stock_features(demo, images))
    stock, ours = (
        (torch.cat(list(each)).float() - exact).norm() / exact.norm()
        for each in (stock_features(small, images), Tower(small, preparer.colours).see(images))
    )
    assert ours < 0.9 * stock < 0.01


def test_a_tower_of_another_activation_is_refused(preparer: ImagePreparer) -> None:
    with pytest.raises(ModelFailed, match="activation"):
        Tower(make_tiny(hidden_act="gelu"), preparer.colours)
