"""What is found in an image: copies that try to get round it score as their original, what fails is named."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from service.screening import nets
from service.screening.glance import glance
from service.screening.heads import Head
from service.screening.image_risk import Sight
from service.screening.nets import NetFailed
from service.screening.signals import IMAGE_DETECTORS, Findings, Signal
from service.screening.skin import RGB
from tenants.risk import Category
from tests.assets import images
from tests.assets.shapes import shapes

THRESHOLD = 0.6
"""The moderate one. Every original is stopped there by both networks."""


@pytest.fixture(scope="module")
def sight() -> Sight:
    return Sight()


def scores(findings: Findings, category: Category = Category.SEXUAL) -> dict[str, float]:
    return {signal.detector: signal.score for signal in findings.signals if signal.category is category}


def grey(picture: RGB) -> RGB:
    return np.repeat(np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8)[..., None], 3, axis=2)


def hue(degrees: int) -> Callable[[RGB], RGB]:
    def rotate(picture: RGB) -> RGB:
        turned = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV), np.uint8)
        turned[..., 0] = (turned[..., 0].astype(int) + degrees // 2) % 180
        return np.asarray(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB), np.uint8)

    return rotate


def border(share: float, colour: tuple[int, int, int], sides: str = "tlbr") -> Callable[[RGB], RGB]:
    def add(picture: RGB) -> RGB:
        width = round(share * picture.shape[0])
        top, left, bottom, right = (width if side in sides else 0 for side in "tlbr")
        framed = cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)
        return np.asarray(framed, np.uint8)

    return add


def strip(pieces: int, place: int, upright: bool) -> Callable[[RGB], RGB]:
    """The picture as one of the squares of a strip; the others show something harmless."""

    def join(picture: RGB) -> RGB:
        side = picture.shape[0]
        squares = [np.asarray(images.photo(side, side, seed=seed)) for seed in range(pieces)]
        squares[place] = picture
        return np.concatenate(squares, axis=0 if upright else 1)

    return join


EVASIONS: dict[str, Callable[[RGB], RGB]] = {
    "grey": grey,
    **{f"hue +{degrees}": hue(degrees) for degrees in (60, 120, 180, 240, 300)},
    "white border": border(0.5, (255, 255, 255)),
    "black border": border(1.0, (0, 0, 0)),
    "red border": border(0.7, (200, 30, 30)),
    "a bar on the right": border(1.5, (20, 90, 160), "r"),
    "border and grey": lambda picture: border(0.6, (255, 255, 255))(grey(picture)),
    "the end of a strip": strip(5, 4, upright=False),
    "the middle of a tower": strip(3, 1, upright=True),
}


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", EVASIONS)
def test_a_copy_does_not_pass_where_its_original_is_stopped(sight: Sight, name: str, number: int) -> None:
    original = shapes()[number]
    for detector in ("open_nsfw", "image_safety"):
        assert scores(sight.look(original))[detector] >= THRESHOLD
    found = scores(sight.look(EVASIONS[name](original)))
    assert found["open_nsfw"] >= THRESHOLD
    assert found["image_safety"] >= THRESHOLD


def test_the_copies_would_pass_if_they_were_looked_at_once() -> None:
    """So the test above tests something: the networks as they were trained let some of each kind through."""
    open_nsfw, image_safety = nets.OpenNsfw(), nets.ImageSafety()
    passed = set()
    for name, evade in EVASIONS.items():
        copies = [evade(original) for original in shapes()]
        nsfw = open_nsfw.look([nets.crop(copy) for copy in copies])[0]
        sexual = image_safety.look([nets.pad(copy) for copy in copies]).sexual
        if (np.minimum(nsfw, sexual) < THRESHOLD).any():
            passed.add(name.split()[0])
    assert {"grey", "hue", "black", "a"} <= passed


def test_content_at_the_rim_is_seen() -> None:
    """What a middle crop loses counts through the second look."""
    nsfw = nets.OpenNsfw()
    moved = [np.roll(shapes()[1], shift, axis=(0, 1)) for shift in range(32, 256, 32)]
    middles = nsfw.look([nets.crop(picture) for picture in moved])[0]
    wholes = nsfw.look([nets.squeeze(picture) for picture in moved])[0]
    index = int((wholes - middles).argmax())
    assert wholes[index] > middles[index] + 0.1
    seen = glance(moved[index], saturation=100, open_nsfw=nsfw, image_safety=None)
    assert seen.nsfw is not None
    assert seen.nsfw >= wholes[index] - 1e-4


def test_harmless_pictures_are_quiet(sight: Sight) -> None:
    for picture in (np.asarray(images.photo(640, 480)), np.full((400, 400, 3), 255, np.uint8)):
        found = sight.look(picture)
        assert found.failed == ()
        assert max(scores(found).values()) < 0.3
        assert scores(found, Category.GORE)["image_safety"] < 0.3


@pytest.mark.parametrize("size", [(28, 28), (28, 5_000), (5_000, 28), (1, 1), (31, 900)])
def test_every_shape_has_all_signals(sight: Sight, size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    found = sight.look(random.integers(0, 256, (*size, 3)).astype(np.uint8))
    assert found.failed == ()
    assert {(signal.detector, signal.category) for signal in found.signals} == {
        ("skin", Category.SEXUAL),
        ("open_nsfw", Category.SEXUAL),
        ("image_safety", Category.SEXUAL),
        ("image_safety", Category.GORE),
    }
    assert all(0 <= signal.score <= 1 for signal in found.signals)


def test_a_network_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sight = Sight()

    def fail(_views: object) -> None:
        raise NetFailed("open_nsfw")

    monkeypatch.setattr(sight._nsfw, "look", fail)
    found = sight.look(shapes()[0])
    assert found.failed == ("open_nsfw",)
    assert "open_nsfw" not in scores(found)
    assert scores(found)["image_safety"] >= THRESHOLD
    assert scores(sight.look(grey(shapes()[0])))["image_safety"] >= THRESHOLD


def test_a_network_whose_file_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nets, "IMAGE_SAFETY", nets.NetFile("no_such_package", "net.onnx", nets.IMAGE_SAFETY.sha256, "MIT")
    )
    sight = Sight()
    found = sight.look(shapes()[0])
    assert found.failed == ("image_safety",)
    assert set(scores(found)) == {"skin", "open_nsfw"}
    assert scores(found, Category.GORE) == {}
    assert {each.name: each.active for each in sight.detectors} == {
        "skin": True,
        "open_nsfw": True,
        "image_safety": False,
    }


def test_without_networks_skin_remains_and_the_networks_have_failed() -> None:
    found = Sight(nets=False).look(shapes()[0])
    assert set(scores(found)) == {"skin"}
    assert found.failed == ("open_nsfw", "image_safety")


class Plugin:
    name = "plugin"
    licence = "AGPL-3.0"
    version = "7"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def detect(self, rgb: RGB) -> tuple[Signal, ...]:
        rgb[:] = 0  # a plugin may scribble on what it is given
        if isinstance(self.answer, Exception):
            raise self.answer
        assert isinstance(self.answer, tuple)
        return self.answer


def test_a_plugin_adds_its_signals_and_shows_its_licence() -> None:
    signal = Signal("plugin", Category.WEAPONS, 0.7, "plugin.rifle")
    sight = Sight(nets=False, plugins=[Plugin((signal,))])
    picture = shapes()[0]
    before = picture.copy()
    assert signal in sight.look(picture).signals
    assert (picture == before).all()
    shown = {each.name: (each.licence, each.version) for each in sight.detectors}
    assert shown["plugin"] == ("AGPL-3.0", "7")


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("no"),
        (Signal("open_nsfw", Category.SEXUAL, 0.0),),
        (Signal("plugin", Category.GORE, 1.5),),
        (Signal("plugin", Category.GORE, float("nan")),),
        ("text",),
    ],
)
def test_a_plugin_that_misbehaves_has_failed(answer: object) -> None:
    found = Sight(nets=False, plugins=[Plugin(answer)]).look(shapes()[0])
    assert found.failed == ("open_nsfw", "image_safety", "plugin")
    assert {signal.detector for signal in found.signals} == {"skin"}


def test_a_head_judges_the_worst_view() -> None:
    weight = np.zeros(nets.FEATURE_COUNT, np.float32)
    weight[0] = 2.0
    head = Head("rifles", Category.WEAPONS, "own", "ab" * 32, weight, -1.0)
    features = np.zeros((3, nets.FEATURE_COUNT), np.float32)
    features[:, 0] = (0.1, 0.9, 0.5)
    assert head.judge(features).score == pytest.approx(1 / (1 + np.exp(-0.8)))
    found = Sight(heads=[head]).look(shapes()[0])
    assert [signal.category for signal in found.signals if signal.detector == "rifles"] == [Category.WEAPONS]
    assert "rifles" in Sight(nets=False, heads=[head]).look(shapes()[0]).failed


def test_our_names_are_those_that_are_kept() -> None:
    assert {each.name for each in Sight(nets=False).detectors} | {"ocr"} == set(IMAGE_DETECTORS)
