"""Plans: which linears and convolutions of a network run in 8 bits, at which noise levels."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

# First and last convolutions see and make the sample or the latent itself, shortcuts carry it past the blocks;
# embeddings and prompt projections run once a call, so that 8 bits would gain nothing.
# Of transformers the same: first and last linear, and the modulations.
_KEPT = re.compile(r"(^|\.)(conv_in|conv_out|time_emb_proj|to_kv|conv_shortcut|quant_conv|post_quant_conv)$"
                   r"|^(time_|class_|add_|encoder_hid_|(x_|context_)embedder$)|(^|\.)norm[a-z0-9_]*\.linear$"
                   r"|(^|\.)(timestep|resolution|aspect_ratio)_embedder\.linear_[12]$"
                   r"|^(pos_embed\.proj|adaln_single\.linear|caption_projection\.linear_[12]|proj_out(_[12])?)$")


def can_be_int8(name: str) -> bool:
    """Whether the layer of this name (as in the packed network) is ever W8A8."""
    return _KEPT.search(name) is None


@dataclass(frozen=True)
class Range:
    """Timesteps t < below (and not of an earlier range), and the layers that stay in bf16 there."""

    below: float
    kept: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """The ranges in ascending order, the last one without an end. sqnr: layer -> dB in each range, where measured
    (Yang et al., "Efficient Quantization Strategies for Latent Diffusion Models", 2023, section 3).

    form: "int8", with one scale and zero point for an activation, as CPUs multiply; or "fp8" or "int8_rows", with a
    scale for each of its rows, as GPUs do, for linears alone and for all timesteps (models/rowwise.py)."""

    ranges: tuple[Range, ...] = (Range(float("inf"), frozenset()),)
    sqnr: Mapping[str, tuple[float, ...]] | None = None
    form: str = "int8"

    def needs_int8(self, name: str) -> bool:
        """Whether the layer runs in 8 bits in some range."""
        return can_be_int8(name) and any(name not in r.kept for r in self.ranges)

    def needs_float(self, name: str) -> bool:
        """Whether the layer runs in bf16 in some range."""
        return not can_be_int8(name) or any(name in r.kept for r in self.ranges)

    def at(self, timestep: float) -> int:
        """The number of the range that a timestep falls into."""
        return next(i for i, r in enumerate(self.ranges) if timestep < r.below or i == len(self.ranges) - 1)

    def to_json(self) -> str:
        return json.dumps({
            "ranges": [{"below": None if r.below == float("inf") else r.below, "kept": sorted(r.kept)}
                       for r in self.ranges],
            "sqnr": None if self.sqnr is None else {k: [round(x, 2) for x in v] for k, v in self.sqnr.items()}})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises CheckpointError for anything but what to_json wrote."""
        try:
            value: Any = json.loads(text)
            ranges = tuple(Range(float("inf") if r["below"] is None else float(r["below"]),
                                 frozenset(str(name) for name in r["kept"])) for r in value["ranges"])
            sqnr = value["sqnr"] and {str(k): tuple(float(x) for x in v) for k, v in value["sqnr"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the int8 plan is damaged ({type(error).__name__}: {error}); write it again with "
                                  "'ldmfast quantize'") from error
        ends = [r.below for r in ranges]
        if not ranges or ends[-1] != float("inf") or any(not a < b for a, b in itertools.pairwise(ends)):
            raise CheckpointError(f"the int8 plan has ranges that end at {ends}, they must ascend and the last have no "
                                  "end; write it again with 'ldmfast quantize'")
        return cls(ranges, sqnr or None)


def choose(sqnr: Mapping[str, Sequence[float]], ends: Sequence[float], least: float) -> Plan:
    """Keeps a layer in bf16 wherever its SQNR is below ``least`` dB. sqnr: layer -> one figure for each range, the
    ranges ending at ``ends`` (the last: infinity)."""
    ranges = [Range(end, frozenset(name for name, row in sqnr.items() if not row[i] >= least))
              for i, end in enumerate(ends)]
    merged = [r for i, r in enumerate(ranges) if i == len(ranges) - 1 or ranges[i + 1].kept != r.kept]
    return Plan(tuple(merged), {name: tuple(row) for name, row in sqnr.items()})
