"""The results of the codec benchmark as tables of plain text."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import aligned, rate, times


def speed(result: dict[str, Any] | None) -> str:
    """Returns the images/s of an operation."""
    if not result:
        return "–"
    return "failed" if "error" in result else rate(result["rounds"])


def baseline_times(result: dict[str, Any] | None) -> str:
    """Returns how many times as fast as the baseline."""
    return times((result or {}).get("times_baseline"))


def share(value: float | None, digits: int = 1) -> str:
    """Returns a share in per cent."""
    return "–" if value is None else f"{value:.{digits}%}"


def size(value: int | None) -> str:
    """Returns bytes in GB."""
    return "–" if value is None else f"{value / 1e9:.2f} GB"


def show_cell(cell: dict[str, Any]) -> str:
    """Returns the table of one size and batch, then the contestants that did not run, with the reasons."""
    heading = [
        "contestant",
        "Q images/s",
        f"x {cell['baseline']}",
        "of peak",
        "encode",
        "decode",
        "host",
        "memory",
        "tokens",
    ]
    rows, failed = [heading], []
    for r in cell["results"]:
        if "error" in r:
            failed.append(f"{r['contestant']}: {r['error']}")
            continue
        failed += [
            f"{r['contestant']}, {o}: {r[o]['error']}"
            for o in ("q", "encode", "decode", "host")
            if "error" in r.get(o, {})
        ]
        if not r["finite"]:
            failed.append(f"{r['contestant']}: its images are not finite")
        q = r.get("q")
        numbers = [speed(q), baseline_times(q), share((q or {}).get("share_of_peak"))]
        numbers += [speed(r.get(operation)) for operation in ("encode", "decode", "host")]
        rows.append([r["contestant"], *numbers, size(r["peak_bytes"]), share(r.get("token_agreement"), 3)])
    title = (
        f"\nbatch {cell['batch']}, {cell['size']} x {cell['size']}: images/s, median (lowest–highest) of the rounds"
    )
    return "\n".join([title, aligned(rows), *failed])


def show_steps(steps: dict[str, Any]) -> str:
    """Returns the table of the tricks: each alone, all together, and each left out; predicted and measured."""
    rows = [["tricks", "predicted Q/s", "x none", "measured Q/s", "x none", "host images/s", "memory"]]
    none = steps["rows"][0]["predicted_images_per_s"]
    for r in steps["rows"]:
        predicted = r["predicted_images_per_s"]
        measured = r.get("measured")
        shown = ["not measured", "–", "–", "–"]
        if measured:
            q = measured.get("q")
            shown = [
                measured.get("error") or speed(q),
                baseline_times(q),
                speed(measured.get("host")),
                size(measured.get("peak_bytes")),
            ]
        rows.append([r["tricks"], f"{predicted:.4g}", f"{predicted / none:.2f}", *shown])
    title = f"\nsteps: torch {steps['dtype']}, batch {steps['batch']}, {steps['size']} x {steps['size']}"
    by_dtype = ", ".join(f"{dtype} {per_s:.4g}" for dtype, per_s in steps["predicted_by_dtype"].items())
    why = [f"predicted Q/s with all tricks: {by_dtype}; split is not built"]
    why += [f"not measured: {steps['not_measured']}"] if "not_measured" in steps else []
    return "\n".join([title, f"predicted for {steps['limits']['source']} (roofline.py)", aligned(rows), *why])
