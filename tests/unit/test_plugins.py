"""Image detectors of other packages: found by entry point, loaded by name, refused where they cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.screening.plugins import BadPlugin, load_plugins

CODE = """
class Good:
    name, licence = "good", "AGPL-3.0"
    def detect(self, rgb):
        return ()

class Unlicensed(Good):
    licence = ""

class Impostor(Good):
    name = "open_nsfw"

def broken():
    raise RuntimeError
"""
POINTS = {
    "good": "other_detectors:Good",
    "unlicensed": "other_detectors:Unlicensed",
    "impostor": "other_detectors:Impostor",
    "broken": "other_detectors:broken",
    "gone": "other_detectors:gone",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with detectors, as an installer leaves it."""
    (tmp_path / "other_detectors.py").write_text(CODE)
    about = tmp_path / "other_detectors-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-detectors\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {target}" for name, target in POINTS.items())
    (about / "entry_points.txt").write_text(f"[pericarp.image_detectors]\n{lines}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_a_named_plugin_is_loaded() -> None:
    (plugin,) = load_plugins(["good"])
    assert (plugin.name, plugin.licence) == ("good", "AGPL-3.0")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["unlicensed", "impostor", "broken", "gone", "absent"])
def test_one_that_cannot_be_used_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadPlugin, match=name):
        load_plugins([name])


def test_none_is_loaded_that_no_setting_names() -> None:
    assert load_plugins([]) == ()
