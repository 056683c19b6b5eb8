"""bench/gpu.sh and its scripts, as far as a machine without a GPU goes: on the small network, with the engine's CPU
stand-in. What needs a GPU (CUDA graphs, events of kernels) does not run here."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parent.parent / "bench"
NAMES = ("gpu_clock", "ops", "race", "gpu_models", "gpu_e2e", "gpu_check", "step_profile")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules of bench/, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        del sys.modules[name]


def test_all_arms_make_the_same_latents(bench):
    """Ours through graphs, ours eagerly and diffusers: one set of weights, start, embeddings and steps."""
    saved: list[dict] = []
    run = bench.gpu_e2e.Bench(bench.gpu_models.MODELS["small"], torch.float32, "cpu", batch=2, steps=2)
    rows = bench.gpu_e2e.measure(run, ["ours", "ours eager", "eager"], 1, lambda rows: saved.append(dict(rows)))
    assert not any("unavailable" in row for row in rows.values()), rows
    assert rows["ours"]["apart"] == rows["ours eager"]["apart"] < 1e-5  # graphs change no bit
    assert 0 < rows["ours"]["unet_error"]["ours"] < 1e-5
    assert [list(s) for s in saved[:3]] == [["ours"], ["ours", "ours eager"], ["ours", "ours eager", "eager"]]
    for row in rows.values():
        assert row["img_s"] == 2 / row["call_s"] and row["it_s"] > 0 and row["startup_s"] >= row["first_call_s"]


def test_an_arm_that_fails_says_why_and_the_others_run(bench, monkeypatch):
    run = bench.gpu_e2e.Bench(bench.gpu_models.MODELS["small"], torch.float32, "cpu", batch=1, steps=1)
    monkeypatch.setattr(run, "theirs", lambda: 1 / 0)
    rows = bench.gpu_e2e.measure(run, ["eager", "ours eager"], 1, lambda rows: None)
    assert rows["eager"] == {"unavailable": "ZeroDivisionError: division by zero"}
    assert rows["ours eager"]["call_s"] > 0 and rows["ours eager"]["apart"] is None


@pytest.mark.parametrize("call", [
    lambda r: F.linear(r(2, 5, 8), r(12, 8), r(12)), lambda r: torch.addmm(r(7), r(3, 4), r(4, 7)),
    lambda r: r(3, 4, 5) @ r(3, 5, 6), lambda r: F.conv2d(r(2, 6, 9, 7), r(4, 6, 3, 3), r(4), stride=2, padding=1),
    lambda r: F.conv2d(r(1, 6, 5, 5), r(4, 3, 3, 3), groups=2)], ids=["linear", "addmm", "bmm", "conv", "groups"])
def test_operations_are_counted_as_torch_counts_them(bench, call):
    with torch.inference_mode(), FlopCounterMode(display=False) as theirs:
        call(torch.ones)
    with torch.inference_mode(), bench.step_profile.Labels() as ours:
        call(torch.ones)
    assert sum(flops for _, flops, _ in ours.calls.values()) == theirs.get_total_flops() > 0


def test_a_profile_accounts_for_the_step(bench, tmp_path):
    model = bench.gpu_models.MODELS["small"]
    record = bench.step_profile.measure(model, torch.float32, "cpu", 1, tmp_path)
    found = {r["op"]: r for r in record["ops"]}
    assert {"ldmfast::attention", "ldmfast::group_norm_silu", "ldmfast::geglu"} <= set(found)
    unet = bench.gpu_models.pipeline(model, torch.float32, "cpu").unet
    attentions = sum(type(m).__name__ == "TransformerBlock" for m in unet.modules()) * 2
    assert found["ldmfast::attention"]["calls"] == attentions
    assert all(r["ms"] > 0 and (r["roofline"] is None or r["roofline"] >= 0) for r in record["ops"])
    assert record["in_ops_ms"] == pytest.approx(sum(r["ms"] for r in record["ops"])) and record["kernels"]
    assert (tmp_path / "profile-small.trace.json.gz").stat().st_size > 1000


def test_ops_are_checked_against_their_references_on_the_device(bench, monkeypatch):
    told: list[str] = []
    rows = bench.gpu_check.check_ops("cpu", (torch.bfloat16,), ["lincomb"], told.append)
    assert len(rows) > 5 and not any(r["wrong"] for r in rows) and not told
    monkeypatch.setattr(bench.gpu_check, "back", lambda value: value * 1.1)
    assert any(r["wrong"].startswith("error") for r in bench.gpu_check.check_ops("cpu", (torch.float32,), ["lincomb"],
                                                                                 told.append)) and told


def test_repeated_calls_use_other_tensors_than_the_last(bench):
    seen: list[tuple[int, ...]] = []
    args = (torch.ones(4), [torch.zeros(3)], 2.0)
    call, calls, how = bench.gpu_clock.repeated(lambda a, b, c: seen.append((a.data_ptr(), b[0].data_ptr())), args, 1e6,
                                                lambda f: 1e-3)
    seen.clear()
    call()
    assert len(seen) == calls == 5 and how == ("no GPU" if not torch.cuda.is_available() else how)
    assert len(set(seen)) == 5 and seen[0] == (args[0].data_ptr(), args[1][0].data_ptr())


def test_the_script_knows_its_stages():
    text = (BENCH / "gpu.sh").read_text()
    subprocess.run(["bash", "-n", BENCH / "gpu.sh"], check=True)
    stages = next(line for line in text.splitlines() if line.startswith("STAGES=")).split('"')[1].split()
    for name in stages:
        assert f"\n#   {name} " in text and re.search(rf"^        (\w+\|)?{name}[|)]", text, re.MULTILINE), name
    wrong = subprocess.run(["bash", BENCH / "gpu.sh", "--dry-run", "nothing"], capture_output=True, text=True,
                           check=False)
    assert wrong.returncode == 2 and "unknown stage nothing" in wrong.stdout
