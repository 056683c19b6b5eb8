"""docs/migrating-from-diffusers.md says something about every argument and method of the pipelines it is about."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers

import ldmfast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migrating-from-diffusers.md"
PIPELINES = [f"StableDiffusion{xl}{kind}Pipeline" for xl in ("", "XL") for kind in ("", "Img2Img", "Inpaint")]
NOT_OURS = {"self", "kwargs", "args", "pack_weights"}  # the last is for saving LoRA weights, as are names below


def _rows(heading: str = "## 2. ") -> dict[str, list[str]]:
    """name in backticks -> the verdicts of the rows it stands in, from that heading on."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text().split(f"\n{heading}")[1].splitlines():
        cells = [c.strip() for c in line.split("|")]
        if line.startswith("|") and len(cells) >= 5 and "---" not in line:
            for name in re.findall(r"[A-Za-z_][A-Za-z_0-9]*", " ".join(re.findall(r"`([^`]*)`", cells[1]))):
                found.setdefault(name, []).append(cells[2])
    return found


def test_every_argument_and_method_has_a_row():
    rows = _rows()
    names = set()
    for pipeline in PIPELINES:
        cls = getattr(diffusers, pipeline)
        names |= set(inspect.signature(cls.__call__).parameters)
        names |= {n for n in dir(cls) if not n.startswith("_") and (callable(getattr(cls, n)) or
                  isinstance(getattr(cls, n), property))}
    disabled = {n for n in names if n.startswith("disable_") and n.replace("disable_", "enable_", 1) in rows}
    missing = {n for n in names - NOT_OURS - disabled - rows.keys() if "lora" not in n and "adapters" not in n}
    assert not missing, sorted(missing)


def test_what_is_said_to_be_the_same_is_there():
    """An argument in a "same" row is an argument of ours with that name, and one that is "not yet" is none."""
    ours = set(inspect.signature(ldmfast.Pipeline.__call__).parameters)
    theirs = set(inspect.signature(diffusers.StableDiffusionXLInpaintPipeline.__call__).parameters)
    rows = _rows("### Arguments of a call")
    for name in theirs - NOT_OURS:
        said = rows[name][:1]  # later ones are of methods
        assert (name in ours) == any(v.startswith(("same", "different", "new")) for v in said), (name, said)
