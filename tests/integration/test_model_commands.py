"""`model …`: the page's commands work as they stand there, and every refusal has its exit status."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from models import ModelRefused
from service.__main__ import app
from tests.acceptance import commands
from tests.acceptance.service_process import REPOSITORY, environment

KMS = json.dumps(["/bin/echo", "00" * 32])
PAGE = (REPOSITORY / "docs" / "models.md").read_text()


def run(words: list[str], environ: dict[str, str] | None = None) -> Result:
    """`python -m service` with these words, in this process; `3<FILE` is as in a shell."""
    files = [word.removeprefix("3<") for word in words if word.startswith("3<")]
    given = [word for word in words if not word.startswith("3<")]
    if files:
        descriptor = os.open(files[0], os.O_RDONLY)
        given[given.index("--seal-fd") + 1] = str(descriptor)
    return CliRunner().invoke(app, given, env=environ)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every command of the page was run, but for those that serve."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "models" / "demo").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "models" / "demo" / "weights", folder / "models" / "demo" / "weights")
    environ: dict[str, str] = {}
    ran = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL):
            if "service serve" in block:
                continue
            for line in block.splitlines():
                words = shlex.split(line)
                if words[0] == "export":
                    name, _, value = words[1].partition("=")
                    environ[name] = value
                elif words[:3] == ["python", "-m", "service"]:
                    done = run(words[3:], environ)
                    assert done.exit_code == 0, (line, done.output, done.exception)
                    ran += 1
                else:
                    subprocess.run(words, check=True, capture_output=True)
    assert ran == 6
    return folder


def test_what_the_page_signs_seals_and_unseals_is_the_same_model(page: Path) -> None:
    plain, again, sealed = page / "my-model", page / "my-model-again", page / "my-sealed-model"
    names = {path.name for path in plain.iterdir()}
    assert names == {path.name for path in again.iterdir()} and "model.sig" in names
    assert {path.name for path in sealed.iterdir()} == {
        name if name == "model.sig" else f"{name}.sealed" for name in names
    }
    for name in names:
        assert (plain / name).read_bytes() == (again / name).read_bytes()
    told = [
        json.loads(run(words).stdout)
        for words in (
            ["model", "manifest", str(plain), "--json"],
            ["model", "verify", str(plain), "--public-key", str(page / "model-key.pub"), "--json"],
        )
    ]
    assert told[0]["digest"] == told[1]["digest"] and told[0]["files"] == told[1]["files"]
    assert (told[0]["revision"], told[1]["revision"]) == ("", "2026-11")
    assert len(told[0]["files"]) == len(names) - 1


def test_a_changed_byte_ends_verify_with_status_1_and_one_sentence(page: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(page / "my-model", tmp_path / "copy"))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    words = ["model", "verify", str(copy), "--public-key", str(page / "model-key.pub")]
    done = commands.run(words, environment(tmp_path), 60.0)
    assert (done.returncode, done.stdout) == (1, "")
    (sentence,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert sentence == "ModelRefused: model.safetensors of model 'copy' is not the file that was signed"


def test_what_signs_must_be_the_owners_alone_and_nothing_unsafe_is_signed(page: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(page / "my-model", tmp_path / "copy"))
    key = Path(shutil.copy(page / "model-key.pem", tmp_path / "key.pem"))
    sign = ["model", "sign", str(copy), "--key", str(key)]
    key.chmod(0o640)
    refused = run(sign)
    assert isinstance(refused.exception, ModelRefused) and "chmod 600" in str(refused.exception)
    key.chmod(0o600)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    before = (copy / "model.sig").read_bytes()
    refused = run(sign)
    assert isinstance(refused.exception, ModelRefused) and "program" in str(refused.exception)
    assert (copy / "model.sig").read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["model", "seal", "MODEL", "OUT"],
        ["model", "seal", "MODEL", "OUT", "--public-key", "KEY"],
        ["model", "seal", "MODEL", "MODEL", "--public-key", "KEY", "--seal-command", KMS],
        ["model", "seal", "MODEL", "OUT", "--public-key", "KEY", "--seal-command", "cat seal.key"],
        ["model", "seal", "MODEL", "OUT", "--public-key", "KEY", "--seal-command", "[1]"],
        ["model", "verify", "MODEL", "--public-key", "KEY", "--seal-fd", "9", "--seal-command", '["true"]'],
        ["model", "verify", "nowhere", "--public-key", "KEY"],
    ],
    ids=range(7),
)
def test_words_that_make_no_sense_end_with_status_2(words: list[str], page: Path, tmp_path: Path) -> None:
    places = {"MODEL": page / "my-model", "OUT": tmp_path / "out", "KEY": page / "model-key.pub"}
    assert run([str(places.get(word, word)) for word in words]).exit_code == 2
    assert not (tmp_path / "out").exists()
