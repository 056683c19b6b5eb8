"""``python -m ldmfast.ops``: every op, its schema, the backends it has and the one that runs here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import ROWS, _load

NEVER_RUN = "compiled, never run"


def devices_on_record(root: Path | None) -> dict[tuple[str, str], set[str]]:
    """(op, backend) -> devices with a measurement under bench/results/<device>/*.json."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted((root / "bench" / "results").glob("*/*.json")) if root else []:
        try:
            rows = json.loads(path.read_text()).get("rows", [])
        except (OSError, ValueError, AttributeError):
            continue
        for row in rows:
            if isinstance(row, dict) and "op" in row and "backend" in row:
                found.setdefault((row["op"], row["backend"]), set()).add(path.parent.name)
    return found


def table() -> list[dict[str, str]]:
    """One dictionary an op: op, schema, one entry a backend, and the live one on the best device here."""
    root = _load.checkout()
    measured = devices_on_record(root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, row in sorted(ROWS.items()):
        entry = {"op": name, "schema": row.schema, "reference": "any device"}
        exists = {
            "cpp": row.has_kernel("cpu") or (root is not None and (root / f"csrc/cpu/{name}.cpp").exists()),
            "cuda": row.live("cuda") == "cuda" or (root is not None and (root / f"csrc/cuda/{name}.cu").exists()),
            "triton": _load.kernel_file(name).exists(),
        }
        for backend, there in exists.items():
            gpus = sorted(d for d in measured.get((name, backend), set()) if not d.startswith("cpu"))
            ran = ", ".join(gpus) or NEVER_RUN
            entry[backend] = ("yes" if backend == "cpp" else ran) if there else "-"
        entry["live"] = f"{row.live(device)} ({device})"
        rows.append(entry)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ldmfast.ops", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="the table as markdown, for the README")
    rows = table()
    columns = ["op", "cpp", "cuda", "triton"]
    if parser.parse_args().markdown:
        print("| op | C++ CPU | CUDA C++ | Triton |\n|---|---|---|---|")
        for row in rows:
            print(f"| `{row['op']}` | " + " | ".join(row[c] for c in columns[1:]) + " |")
        return
    columns += ["live"]
    width = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    print("  ".join(c.ljust(width[c]) for c in columns))
    for row in rows:
        print("  ".join(row[c].ljust(width[c]) for c in columns))
        print(f"    {row['schema']}")


if __name__ == "__main__":
    main()
