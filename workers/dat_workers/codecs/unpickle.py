"""Reads a pickle written by `torch.save` without running it, and without the packages whose classes it names.

torch's weights-only unpickler calls nothing but its own tensor functions and the classes registered as safe.
Published checkpoints also name classes that have nothing to do with their weights. ALLOWED lists them, and each is
replaced by a stand-in that does nothing, so that pytorch_lightning, omegaconf and numpy are not imported. A pickle
that names anything else is refused.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dat_workers.codecs.spec import CodecError


class _Ignored:
    """Stands in for a class named in a checkpoint: accepts any arguments and any state, and discards them."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _IgnoredDict(_Ignored):
    """Stands in for a subclass of dict, as a plain OrderedDict: the unpickler can add items to nothing else."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


_OBJECTS = (
    # Lightning 1.0 to 1.9 stores callback states under the callback's class, with its path and score
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    # hyper-parameters held by OmegaConf
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "typing.Any",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "builtins.tuple",
    # best_model_score and the learning rates are numpy scalars
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)
_MAPPINGS = (
    "builtins.dict",
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)
ALLOWED = frozenset((*_OBJECTS, *_MAPPINGS))

# The unpickler looks up stand-ins by identity, so every name needs a separate class.
_STAND_INS: list[Any] = [
    (type(name.rpartition(".")[2], (base,), {}), name)
    for names, base in ((_OBJECTS, _Ignored), (_MAPPINGS, _IgnoredDict))
    for name in names
]


def unpickle(path: Path, where: str) -> object:
    """Returns the object that `torch.save` wrote to `path`: tensors on the CPU, and stand-ins for other objects.

    >>> unpickle(Path("last.ckpt"), "last.ckpt")["state_dict"]  # doctest: +SKIP

    `where` is the name of the file in errors. The members of a zip must be stored without compression, as
    `archive.unpacked` leaves them: torch maps the file into memory, which saves reading the optimizer states, twice
    the size of the weights.

    Raises CodecError for a damaged file, and for a file that names anything outside ALLOWED; the error lists the
    names that are not allowed.
    """
    if kind := _other_kind(path):
        raise CodecError(f"{where} is not a checkpoint that can be read: it is {kind}")
    try:
        has_bytearray = _names_bytearray(path)
    except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: a member is encrypted
        raise CodecError(f"{where} is not a checkpoint that can be read: {error}") from error
    if has_bytearray:
        raise CodecError(
            f"{where} was refused: its pickle names builtins.bytearray, which no published codec needs, and with "
            "which a few bytes of it can claim any amount of memory. Nothing in it was run"
        )
    with safe_globals(_STAND_INS):
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a damaged or hostile pickle raises anything, from EOFError to struct.error
            # torch's message names only the global at which it stopped, and names a builtin without its module.
            names = _foreign_globals(path) | set(re.findall(r"GLOBAL (\S+\.\S+) w", str(error)))
            if names:
                raise CodecError(
                    f"{where} was refused: its pickle names {', '.join(sorted(names))}, which no published codec "
                    "needs. Nothing in it was run"
                ) from error
            raise CodecError(f"{where} is not a checkpoint that can be read: {_reason(error)}") from error


# The first bytes of files that people take for checkpoints.
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"<": "a web page or XML; download the checkpoint again",
}


def _other_kind(path: Path) -> str:
    """Says what a file is, and what to do, if it is known not to be a checkpoint; else returns an empty string."""
    with path.open("rb") as file:
        head = file.read(8)
    if kind := next((kind for start, kind in _OTHER_KINDS.items() if head.startswith(start)), ""):
        return kind
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist()):
                return "a TorchScript archive, which holds a program; import a checkpoint that `torch.save` wrote"
        return ""
    if head.startswith(b"PK"):
        return "a zip archive whose end is missing; fetch the file again"
    with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as archive_of_tar:
        if archive_of_tar.next() is not None:
            return "a tar archive; unpack it first, or import a checkpoint that `torch.save` wrote"
    return ""


def _reason(error: Exception) -> str:
    """Returns the first line of what torch reports, without its advice to load the file without the safe mode."""
    first = str(error.__context__ or error).strip().partition("\n")[0]
    sentences = [s for s in re.split(r"(?<=[.!?]) +", first) if "weights_only" not in s and "torch.load" not in s]
    return " ".join(sentences) or type(error).__name__


_TORCHS_OWN = re.compile(r"torch\.|collections\.(OrderedDict|Counter)$|_codecs\.encode$")


def _foreign_globals(path: Path) -> set[str]:
    """Returns the names in a pickle that torch's weights-only unpickler refuses, without running the pickle."""
    with contextlib.suppress(Exception):
        return set(get_unsafe_globals_in_checkpoint(path))
    # torch's own function for this reads neither its older format nor pickle protocols other than 2.
    with path.open("rb") as stream:
        names = _named_globals(stream, 5)
    return {name for name in names if name not in ALLOWED and not _TORCHS_OWN.match(name)}


def _names_bytearray(path: Path) -> bool:
    """Returns True if a pickle names bytearray, which torch's weights-only unpickler calls with any number."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            return "builtins.bytearray" in _named_globals(stream, 5)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if PurePosixPath(name).name == "data.pkl":
                with archive.open(name) as member:
                    if "builtins.bytearray" in _named_globals(member, 1):
                        return True
    return False


def _named_globals(stream: IO[bytes], pickles: int) -> set[str]:
    """Returns the names in the pickles of a stream, up to the first damage.

    torch's older format is five pickles: magic number, version, system, object and keys.
    """
    names: set[str] = set()
    with contextlib.suppress(Exception):
        for _ in range(pickles):
            _collect_globals(stream, names)
    return names


def _collect_globals(stream: IO[bytes], names: set[str]) -> None:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
