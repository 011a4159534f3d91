"""`model …`: list, sign, check and seal a model's files. None of it needs the service, or its database."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from models import ModelRefused, Trust
from models.folder import Folder
from models.manifest import SIGNATURE, Manifest, public_der, read_private_key, sign
from models.sealed_folder import seal_folder, unseal_folder
from service.cli.console import JsonFlag, print_json, print_table, progress
from service.custody import read_seal_key, read_signer

app = typer.Typer(
    help="A model's files: list, sign, check, seal. A signature says which files a model has, and the SHA-256 of each "
    "(OpenSSF model signing, v1.0). A service with PERICARP_MODEL_KEY serves what that key has signed, and nothing else.",
    no_args_is_help=True,
)
Model = Annotated[
    Path, typer.Argument(metavar="DIR", help="The model's folder.", exists=True, file_okay=False)
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")]
SignatureFile = Annotated[
    Path | None,
    typer.Option(
        "--signature",
        envvar="PERICARP_MODEL_SIGNATURE",
        metavar="FILE",
        help=f"The signed manifest; {SIGNATURE} in DIR if left out.",
    ),
]
PublicKeyFile = Annotated[
    Path,
    typer.Option(
        "--public-key",
        envvar="PERICARP_MODEL_KEY",
        metavar="PEM",
        help="Who must have signed it.",
        exists=True,
    ),
]
SealDescriptor = Annotated[
    int | None,
    typer.Option(
        "--seal-fd",
        envvar="PERICARP_MODEL_SEAL_FD",
        min=0,
        metavar="N",
        help="Descriptor that the key to seal with is read from: 32 bytes, or 64 hex digits.",
    ),
]
SealCommand = Annotated[
    str | None,
    typer.Option(
        "--seal-command",
        envvar="PERICARP_MODEL_SEAL_COMMAND",
        metavar="JSON",
        help="Or the command that prints it, as a JSON list of words; no shell runs it.",
    ),
]


@app.command("manifest")
def show_manifest(directory: Model, as_json: JsonFlag = False) -> None:
    """List a model's files with the SHA-256 of each, and the digest of them all. Refuses what may be a program.

    It is what `sign` would sign. The root digest stands in /readyz and in the log's entries once the model is served.
    """
    folder = Folder(directory, directory.resolve().name)
    _print(_check(folder), as_json=as_json)


@app.command("sign")
def sign_model(
    directory: Model,
    key: Annotated[
        Path,
        typer.Option(
            "--key",
            metavar="PEM",
            exists=True,
            help="Private key: Ed25519, or ECDSA on P-256, P-384 or P-521. Keep it off the machines that serve.",
        ),
    ],
    signature: SignatureFile = None,
    revision: Annotated[
        str, typer.Option(help="What to call these files in entries of the log; it is signed too.")
    ] = "",
    password_fd: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Descriptor with the password of an encrypted key.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Sign a model: write which files it has, and their SHA-256, with your signature.

    Make a key with: openssl genpkey -algorithm ed25519 -out model-key.pem; and its public half with: openssl pkey -in
    model-key.pem -pubout -out model-key.pub. Whoever else speaks OpenSSF model signing can check a signature by an ECDSA
    key.
    """
    if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ModelRefused("the private key may be read by others than its owner: chmod 600")
    password = None
    if password_fd is not None:
        with os.fdopen(password_fd, "rb") as file:
            password = file.read().rstrip(b"\n")
    private = read_private_key(key.read_bytes(), password)
    target = signature or directory / SIGNATURE
    name = directory.resolve().name
    found = _check(Folder(directory, name, Trust(signature=str(target))))
    manifest = Manifest(found.files, revision)
    bundle = sign(manifest, private, name=name)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fresh.write_bytes(bundle)
        fresh.replace(target)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    # As the service will: it must not find something else.
    Folder(directory, name, Trust(public_der(private.public_key()), str(target)))
    _print(manifest, as_json=as_json)


@app.command("verify")
def verify_model(
    directory: Model,
    public_key: PublicKeyFile,
    signature: SignatureFile = None,
    seal_fd: SealDescriptor = None,
    seal_command: SealCommand = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every byte of a model against its signature, as the service does when it loads it; sealed or not.

    Fails for a changed byte, a file more or less, a link, a pickle, code, and what everybody may write.
    """
    _print(_check(_open(directory, public_key, signature, _key(seal_fd, seal_command))), as_json=as_json)


@app.command("seal")
def seal_model(
    directory: Model,
    out: Out,
    public_key: PublicKeyFile,
    signature: SignatureFile = None,
    seal_fd: SealDescriptor = None,
    seal_command: SealCommand = None,
) -> None:
    """Encrypt a signed model's files (AES-256, Cobblestone-256) for a disk that others may read.

    Make a key with: openssl rand -out seal.key 32; and seal with: model seal DIR OUT --seal-fd 3 3<seal.key. The service
    needs the same key, and opens the files in memory alone. Whoever loses it has lost the sealed copy.
    """
    key = _key(seal_fd, seal_command)
    if key is None:
        raise typer.BadParameter("give the key by --seal-fd or --seal-command")
    _rewrite(
        out, lambda told: seal_folder(_open(directory, public_key, signature, None), out, key, told=told)
    )
    typer.echo(f"Sealed: {out}", err=True)


@app.command("unseal")
def unseal_model(
    directory: Model,
    out: Out,
    public_key: PublicKeyFile,
    signature: SignatureFile = None,
    seal_fd: SealDescriptor = None,
    seal_command: SealCommand = None,
) -> None:
    """Write a sealed model's files as they were. The service never does: it opens them in memory."""
    key = _key(seal_fd, seal_command)
    _rewrite(out, lambda told: unseal_folder(_open(directory, public_key, signature, key), out, told=told))
    typer.echo(f"Unsealed: {out}", err=True)


def _open(directory: Path, public_key: Path, signature: Path | None, key: bytes | None) -> Folder:
    trust = Trust(read_signer(public_key), str(signature) if signature else "", key or b"")
    return Folder(directory, directory.resolve().name, trust)


def _check(folder: Folder) -> Manifest:
    with progress() as shown:
        bar = shown.add_task("Reading files", total=None)
        return folder.check(lambda done, size: shown.update(bar, completed=done, total=size))


def _rewrite(out: Path, write: Any) -> None:
    if out.exists():
        raise typer.BadParameter("OUT is there already")
    with progress() as shown:
        bar = shown.add_task("Writing files", total=None)
        write(lambda done, size: shown.update(bar, completed=done, total=size))


def _key(descriptor: int | None, command: str | None) -> bytes | None:
    if descriptor is not None and command:
        raise typer.BadParameter("--seal-fd and --seal-command exclude each other")
    words: Any = ()
    if command:
        try:
            words = orjson.loads(command)
        except orjson.JSONDecodeError:
            words = None
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise typer.BadParameter('--seal-command is a JSON list of words: ["kms", "decrypt"]')
    return read_seal_key(descriptor, words)


def _print(manifest: Manifest, *, as_json: bool) -> None:
    if as_json:
        print_json({"digest": manifest.digest, "revision": manifest.revision, "files": dict(manifest.files)})
        return
    print_table("Files", ["file", "sha256"], sorted(manifest.files.items()))
    revision = f", revision {manifest.revision}" if manifest.revision else ""
    typer.echo(f"Digest {manifest.digest}{revision}")
