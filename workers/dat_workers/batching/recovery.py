"""A batch that failed, taken up again: halved where memory ran out, each request alone where one spoiled it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dat_workers.batching.device_copies import Array
from dat_workers.batching.parts import Piece, joint
from dat_workers.discretizer import Discretizer
from dat_workers.errors import OutOfMemory

# by their words, for ONNX Runtime's exceptions are no RuntimeErrors
LOST = ("CUDA error", "CUDA failure")
NO_MEMORY = ("out of memory", "can't allocate memory", "Failed to allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_lost(error: object) -> bool:
    """Whether nothing more can be computed on this device: CUDA's errors stay, its lack of memory passes."""
    if not isinstance(error, Exception) or is_out_of_memory(error):
        return False
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or any(said in str(error) for said in LOST)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return any(said in str(error) for said in NO_MEMORY)


def run_in_parts(
    discretizer: Discretizer, pieces: Sequence[Piece], error: Exception
) -> Iterator[tuple[list[Piece], dict[str, Array] | Exception]]:
    """Computes a batch's pieces again, after `error`: parts of it, each with its results or its own error.

    Out of memory: two halves, each once more. Anything else: each request's rows alone, for one may have spoiled
    the others' batch. Nothing is tried a third time.
    """
    if is_out_of_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    parts = halves(pieces) if is_out_of_memory(error) else [[piece] for piece in pieces]
    for part in parts:
        try:
            yield part, run_alone(discretizer, part)
        except Exception as again:
            if is_out_of_memory(again):
                rows = sum(piece.count for piece in part)
                said = str(again).splitlines()[0][:200]
                yield part, OutOfMemory(f"no memory for {rows} images at once: {said}")
            else:
                yield part, again


def halves(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The rows of a batch in two parts; one row stays one part."""
    room = max(1, sum(piece.count for piece in pieces) // 2)
    first: list[Piece] = []
    second: list[Piece] = []
    for piece in pieces:
        count = min(room, piece.count)
        room -= count
        if count:
            first.append(Piece(piece.request, piece.start, count))
        if piece.count > count:
            second.append(Piece(piece.request, piece.start + count, piece.count - count))
    return [first, second] if second else [first]


def run_alone(discretizer: Discretizer, pieces: Sequence[Piece]) -> dict[str, Array]:
    """The results of some pieces, nothing else on its way meanwhile."""
    compute = discretizer.compute(pieces[0].request.work.task)
    (made,) = discretizer.stream([joint(pieces, compute)])
    return made
