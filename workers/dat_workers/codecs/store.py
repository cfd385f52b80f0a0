"""Finds codecs shipped in the package or installed under HOME, and installs new ones under HOME.

HOME is `$DAT_HOME`, or by default a folder in the user's cache folder.

HOME/codecs/NAME.safetensors    installed codecs
HOME/downloads/                 unfinished downloads (`.part`), each deleted once its codec is installed
HOME/hashes.json                for each download address, the sha256 of the first file fetched from it
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from dat_workers.codecs import file
from dat_workers.codecs.file import CodecFile, Origin
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.registry import REGISTRY, CodecNotFound
from dat_workers.codecs.spec import CodecError, CodecSpec

EMBEDDED = ("tiny-f8",)
EMBEDDED_FOLDER = Path(__file__).parent
SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """Returns the name if it is safe as a file name; raises CodecError if it is not.

    >>> check_name("vq-f8_2")
    'vq-f8_2'
    """
    if not _NAME.fullmatch(name):
        raise CodecError(
            f"codec name {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' and '-', and do not begin "
            "with '.'"
        )
    return name


class CodecStore:
    """Finds, loads and installs the codecs of this machine.

    >>> CodecStore().load("tiny-f8").spec.codebook_size  # doctest: +SKIP
    16384

    `home` defaults to `$DAT_HOME`, then to the user's cache folder.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = Path(home or os.environ.get("DAT_HOME") or platformdirs.user_cache_dir("dat"))

    @property
    def folder(self) -> Path:
        """The folder of the installed codecs."""
        return self.home / "codecs"

    def names(self) -> list[str]:
        """Returns all names of the registry, followed by the installed codecs that are not in the registry."""
        installed = sorted(p.name.removesuffix(SUFFIX) for p in self.folder.glob(f"*{SUFFIX}"))
        return [*REGISTRY, *(name for name in installed if name not in REGISTRY and _NAME.fullmatch(name))]

    def path(self, name: str) -> Path:
        """Returns the path of a codec's file, even if the codec is not installed.

        Raises CodecError for an unsafe name, and for `identity`, which has no file.
        """
        if check_name(name) == "identity":
            raise CodecError("codec 'identity' has no weights, and therefore no file")
        return (EMBEDDED_FOLDER if name in EMBEDDED else self.folder) / f"{name}{SUFFIX}"

    def status(self, name: str) -> str:
        """Returns "embedded", "installed", "not installed", or "broken: " followed by the reason.

        The file's header, names, shapes and size are checked here; its weights are checked when it is loaded.
        """
        if name == "identity":
            return "embedded"
        try:
            path = self.path(name)
            if not path.is_file():
                return "broken: not in the package" if name in EMBEDDED else "not installed"
            _check_matches_name(name, file.read_header(path).spec, path)
        except CodecError as error:
            return f"broken: {error}"
        return "embedded" if name in EMBEDDED else "installed"

    def load(self, name: str) -> CodecFile:
        """Reads and verifies a codec.

        Raises CodecNotFound for an unknown name, CodecError for a codec that is not installed (the message gives
        the command that installs it), and CodecError for a file that `file.read` refuses or that holds a codec
        other than the one it is named after.
        """
        if name == "identity":
            spec = REGISTRY[name]
            return CodecFile(spec, file.fingerprint(spec, {}), Origin("built in", "", ""), {})
        path = self.path(name)
        if not path.is_file():
            raise self._absent(name)
        codec = file.read(path)
        _check_matches_name(name, codec.spec, path)
        return codec

    def spec(self, name: str) -> CodecSpec:
        """Returns a codec's geometry from its file's header, in milliseconds. Raises CodecError as `load` does."""
        if name == "identity":
            return REGISTRY[name]
        path = self.path(name)
        if not path.is_file():
            raise self._absent(name)
        spec = file.read_header(path).spec
        _check_matches_name(name, spec, path)
        return spec

    def _absent(self, name: str) -> CodecError:
        if name not in REGISTRY:
            return CodecNotFound(name, self.names())
        if name in EMBEDDED:
            return CodecError(
                f"codec {name!r} is missing from the package ({self.path(name)}); reinstall dat-service"
            )
        return CodecError(
            f"codec {name!r} is not installed; run: dat codecs pull {name} "
            f"(or, if you have the checkpoint: dat codecs import CKPT --as {name})"
        )

    def add(self, spec: CodecSpec, tensors: Mapping[str, Tensor], origin: Origin, replace: bool = False) -> str:
        """Installs a codec under `spec.name` and returns its fingerprint.

        Raises CodecError for a name that is unsafe or belongs to a codec shipped in the package, for a geometry
        that differs from the registry's, and, unless `replace` is set, if a codec of that name with a different
        fingerprint is installed.
        """
        path = self.path(spec.name)
        if spec.name in EMBEDDED:
            raise CodecError(f"codec {spec.name!r} ships inside the package; choose another name")
        _check_matches_name(spec.name, spec, path)
        if not replace and self.status(spec.name) == "installed":
            old, new = file.read_header(path).fingerprint, file.fingerprint(spec, tensors)
            if old != new:
                raise CodecError(
                    f"codec {spec.name!r} is already installed with fingerprint {old}; the new one has fingerprint "
                    f"{new}. Nothing was replaced: remove {path} first, or import with --force"
                )
        return file.write(path, spec, tensors, origin)


def _check_matches_name(name: str, spec: CodecSpec, path: Path) -> None:
    if spec.name != name:
        raise CodecError(f"{path} holds codec {spec.name!r}, not {name!r}")
    if name in REGISTRY and file.geometry(spec) != file.geometry(REGISTRY[name]):
        raise CodecError(
            f"{path}: codec {name!r} must have the geometry {file.geometry(REGISTRY[name])}, "
            f"but the file has {file.geometry(spec)}"
        )


def load_model(codec: str | CodecFile) -> VQGAN:
    """Returns the codec as an fp32 network on the CPU, in eval mode and without gradients.

    >>> load_model("tiny-f8").encode(torch.zeros(1, 3, 64, 64)).shape  # doctest: +SKIP
    torch.Size([1, 8, 8])

    Raises CodecError as `CodecStore.load` does, and for `identity`, which has no network.
    """
    if isinstance(codec, str):
        codec = CodecStore().load(codec)
    if codec.spec.architecture != "vqgan":
        raise CodecError(f"codec {codec.spec.name!r} has no network (architecture {codec.spec.architecture!r})")
    # The network is built on the meta device because the random initialisation of a full-size one takes seconds.
    with torch.device("meta"):
        model = VQGAN(codec.spec)
    weights = {key: tensor.to(torch.float32, copy=True) for key, tensor in codec.tensors.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()
