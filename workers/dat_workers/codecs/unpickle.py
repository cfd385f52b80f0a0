"""Reading a pickle of torch's without running it, and without the packages whose classes it names.

torch's weights-only unpickler runs nothing but its own tensor functions and what it is told is safe. Told
so are the names in ALLOWED, which published checkpoints hold beside their weights, each answered by a
stand-in that does nothing: pytorch_lightning, omegaconf and numpy are not imported. Every other name is
refused.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from dat_workers.codecs.spec import CodecError


class _Ignored:
    """Stands for any class named in a checkpoint: takes all arguments and state, keeps nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _IgnoredDict(_Ignored):
    """Stands for subclasses of dict: the unpickler fills items only into a plain OrderedDict."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


_OBJECTS = (
    # Lightning 1.0 to 1.9 keys callback states by class, and keeps the callback's path and score
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    # hyper-parameters kept by OmegaConf
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
    # best_model_score and learning rates as numpy scalars
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


def _stand_ins() -> list[Any]:
    # one class a name: the unpickler looks stand-ins up by identity
    pairs: list[Any] = [(type(name.rpartition(".")[2], (_Ignored,), {}), name) for name in _OBJECTS]
    return pairs + [(type(name.rpartition(".")[2], (_IgnoredDict,), {}), name) for name in _MAPPINGS]


_STAND_INS = _stand_ins()


def unpickle(path: Path, where: str) -> object:
    """What `torch.save` wrote to `path`, tensors on the CPU, stand-ins for everything else.

    >>> unpickle(Path("last.ckpt"), "last.ckpt")["state_dict"]  # doctest: +SKIP

    `where` is how errors call the file. Raises CodecError for a damaged file, and for one that names
    anything outside ALLOWED; the error lists those names.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=_can_map(path))
    except Exception as error:  # a damaged or hostile pickle raises anything, from EOFError to struct.error
        # torch names the one it stopped at; it shows builtins without their module
        stopped_at = re.findall(r"GLOBAL (\S+) w", str(error))
        names = sorted(set(stopped_at) | set(_foreign_globals(path)))
        if names:
            raise CodecError(
                f"{where} was refused: its pickle asks for {', '.join(names)}, "
                "which no published codec needs; nothing of it was run"
            ) from error
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CodecError(f"{where} is not a checkpoint that can be read: {reason[0]}") from error


def _can_map(path: Path) -> bool:
    # mapped, the optimizer states (twice the weights) are never read; needs torch's zip, uncompressed
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


_TORCHS_OWN = re.compile(r"torch\.|collections\.(OrderedDict|Counter)$|_codecs\.encode$")


def _foreign_globals(path: Path) -> list[str]:
    """The names a pickle asks for that are neither torch's own nor ALLOWED, by disassembly alone."""
    names: set[str] = set()
    # the disassembler, too, meets damaged data; what it saw until then still counts
    with contextlib.suppress(Exception):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if PurePosixPath(name).name == "data.pkl":
                        with archive.open(name) as stream:
                            _collect(stream, names)
        else:
            with path.open("rb") as stream:
                for _ in range(5):  # torch's older format: magic, version, system, object, keys
                    _collect(stream, names)
    return sorted(name for name in names if name not in ALLOWED and not _TORCHS_OWN.match(name))


def _collect(stream: IO[bytes], names: set[str]) -> None:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
