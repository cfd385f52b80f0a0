"""Fair queueing, by counting who is served."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dat_workers.batching.fair_queue import FairQueue, QueuedItem


def entry(flow: str, rows: int, group: str = "g", cost: float = 1.0) -> QueuedItem:
    return QueuedItem(flow, group, rows, cost, arrived=0.0)


def served(queue: FairQueue[QueuedItem], rows: int, room: int = 4) -> Counter[str]:
    """Rows that each flow gets of the next `rows`, in batches of `room`."""
    counts: Counter[str] = Counter()
    while counts.total() < rows and (head := queue.head()):
        left = room
        while left and (taken := queue.take(head.group, left)):
            counts[taken[0].flow] += taken[1]
            left -= taken[1]
    return counts


def test_a_flood_takes_no_more_than_its_share() -> None:
    queue = FairQueue[QueuedItem]()
    for _ in range(50):
        queue.push(entry("flood", 16))
    for _ in range(40):
        queue.push(entry("one at a time", 1))
    counts = served(queue, 80)
    assert abs(counts["flood"] - counts["one at a time"]) <= 4


def test_dear_rows_count_for_what_they_cost() -> None:
    queue = FairQueue[QueuedItem]()
    for _ in range(100):
        queue.push(entry("dear", 1, "large", cost=4.0))
        queue.push(entry("cheap", 1, "small", cost=1.0))
    counts = served(queue, 60, room=1)
    assert 3 < counts["cheap"] / counts["dear"] < 5


def test_a_pause_saves_nothing_up() -> None:
    queue = FairQueue[QueuedItem]()
    queue.push(entry("busy", 1000))
    served(queue, 500)
    queue.push(entry("late", 1000))
    counts = served(queue, 200)
    assert abs(counts["busy"] - counts["late"]) <= 8


def test_a_new_name_each_time_gains_nothing() -> None:
    queue = FairQueue[QueuedItem]()
    queue.push(entry("bulk", 10_000))
    bulk = 0
    for i in range(400):
        queue.push(entry(f"fresh {i}", 1))
        taken = queue.take("g", 1)
        assert taken is not None
        bulk += taken[0].flow == "bulk"
    # each fresh name is a client of its own while it waits; of those that wait the bulk is one
    assert bulk >= 10
    assert len(queue._flows) <= 2 + queue.rows


def test_a_large_entry_is_split_and_groups_are_kept_apart() -> None:
    queue = FairQueue[QueuedItem]()
    queue.push(entry("a", 10, "x"))
    queue.push(entry("b", 2, "y"))
    queue.push(entry("c", 1, "x"))
    first = queue.take("x", 8)
    assert first is not None
    assert (first[0].flow, first[1]) == ("a", 8)
    assert queue.rows_of("x")[0] == 3
    assert served(queue, 100) == {"a": 2, "b": 2, "c": 1}
    assert queue.head() is None


def test_what_is_removed_is_not_served() -> None:
    queue = FairQueue[QueuedItem]()
    gone = entry("a", 3)
    queue.push(gone)
    queue.push(entry("b", 1))
    queue.remove(gone)
    queue.remove(gone)
    assert served(queue, 10) == {"b": 1}
    assert queue.rows == 0


def test_the_wait_counts_of_others_only_what_comes_before() -> None:
    queue = FairQueue[QueuedItem]()
    queue.push(entry("flood", 1000))
    assert queue.cost_before("new", 8) == 8
    assert queue.cost_before("flood", 8) == 1000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 9)), max_size=30))
def test_every_row_is_served_once(pushed: list[tuple[str, str, int]]) -> None:
    queue = FairQueue[QueuedItem]()
    for flow, group, rows in pushed:
        queue.push(entry(flow, rows, group))
    counts = served(queue, 10_000, room=3)
    for flow in "abc":
        assert counts[flow] == sum(rows for name, _, rows in pushed if name == flow)
