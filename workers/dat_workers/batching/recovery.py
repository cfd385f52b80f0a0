"""Computes a failed batch again: in halves if memory ran out, else request by request, to isolate a faulty one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dat_client.errors import sentence
from dat_client.wire.tensors import Array
from dat_workers.batching.parts import Part, device_batch, row_count
from dat_workers.discretizer import Discretizer
from dat_workers.engines.device_errors import free_cached_memory, is_out_of_memory
from dat_workers.errors import OutOfMemory


def run_in_parts(
    discretizer: Discretizer, parts: Sequence[Part], error: Exception
) -> Iterator[tuple[list[Part], dict[str, Array] | Exception]]:
    """Computes a batch that failed with `error` again, in smaller groups of its parts.

    Yields each group with its results or its own error. If memory ran out, there are two groups, each with half the
    rows; after any other error each request is a group of its own. A group that fails is not computed again.
    """
    if is_out_of_memory(error):
        free_cached_memory()
    compute = discretizer.compute(parts[0].queued.request.task)
    groups = halves(parts) if is_out_of_memory(error) else [[part] for part in parts]
    for group in groups:
        try:
            (results,) = discretizer.stream([device_batch(group, compute)])
            yield group, results
        except Exception as second:
            if is_out_of_memory(second):
                reason = sentence(str(second).partition("\n")[0])
                yield (
                    group,
                    OutOfMemory(f"not enough memory for {row_count(group)} images at once: {reason}"),
                )
            else:
                yield group, second


def halves(parts: Sequence[Part]) -> list[list[Part]]:
    """Splits the rows of a batch into two groups; a batch of a single row gives one group."""
    room = max(1, row_count(parts) // 2)
    first: list[Part] = []
    second: list[Part] = []
    for part in parts:
        count = min(room, part.count)
        room -= count
        if count:
            first.append(Part(part.queued, part.start, count))
        if part.count > count:
            second.append(Part(part.queued, part.start + count, part.count - count))
    return [first, second] if second else [first]
