"""bench/peers.py on networks small enough for a test: the rows it records, what it does with arms that fail, and how
records are merged."""

from __future__ import annotations

import importlib
import json
import math
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
UNET = {"sample_size": 8, "block_out_channels": (16, 32), "cross_attention_dim": 24, "attention_head_dim": 2,
        "norm_num_groups": 8, "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
VAE = {"block_out_channels": (16, 32), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8,
       "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The modules of bench/, which are scripts beside each other, writing their records into tmp_path."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("ops", "race", "arms", "joint_arms", "e2e", "work", "chart", "peers")
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(found.ops, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(found.race, "SAMPLE_S", 0.002)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield found
    torch.set_num_threads(threads)
    for name in names:
        del sys.modules[name]


def fixed(bench: SimpleNamespace, output: torch.Tensor, **facts: float):
    return bench.race.Arm(lambda: (lambda: output, dict(facts)), "peer 1.0", "none")


def test_a_unet_step_is_compared_with_diffusers_on_the_same_weights(bench, tmp_path):
    run = bench.work.Run(threads=1, repeats=3, cache=tmp_path, words=("diffusers", "ldmfast exact", "ldmfast bf16"))
    case, entry = bench.work.unet_case(run, "small", UNET, 8)
    rows = entry["arms"]
    assert case == "small" and set(rows) == {"diffusers fp32", "diffusers bf16", "ldmfast exact", "ldmfast bf16"}
    assert rows["diffusers fp32"]["error"] == 0
    assert 0 < rows["ldmfast exact"]["error"] < 1e-5 < rows["ldmfast bf16"]["error"] < 0.05
    for name, row in rows.items():
        assert "unavailable" not in row and row["version"].startswith(name.split()[0]) and row["settings"]
        assert len(row["repeats_s"]) == 3 and sorted(row["repeats_s"])[1] == row["median_s"] > 0
        assert row["startup_s"] >= row["build_s"] >= 0 and row["calls_per_repeat"] >= 1
    assert rows["ldmfast exact"]["prepare_s"] > 0


SD3 = {"sample_size": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
       "joint_attention_dim": 24, "caption_projection_dim": 64, "pooled_projection_dim": 20, "pos_embed_max_size": 8}
FLUX = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}


def test_joint_transformers_are_compared_on_the_same_weights(bench, tmp_path):
    run = bench.work.Run(threads=1, repeats=1, cache=tmp_path)
    for net in (bench.joint_arms.sd3(SD3, 8, 5), bench.joint_arms.flux(FLUX, 4, 5)):
        entrants = {"diffusers bf16": bench.arms.eager(net, torch.bfloat16)}
        entrants |= {f"ldmfast {p}": bench.joint_arms.ours(net, p) for p in ("bf16", "int8")}
        rows = run.race("small", entrants, net.reference, "")[1]["arms"]
        assert all("unavailable" not in row and 0 < row["error"] < 0.05 for row in rows.values())
        assert rows["ldmfast bf16"]["prepare_s"] > 0


def test_both_networks_of_the_vae_decode_the_same(bench, tmp_path):
    run = bench.work.Run(threads=1, repeats=1, cache=tmp_path, words=("diffusers fp32", "ldmfast"))
    rows = bench.work.vae_case(run, "small vae", VAE, 4)[1]["arms"]
    assert 0 < rows["ldmfast exact"]["error"] < 1e-5 < rows["ldmfast bf16"]["error"] < 0.05


def test_the_low_network_is_made_of_the_same_weights(bench):
    """sdxl keeps bf16 weights alone; its reference is still that of the fp32 weights."""
    full, low = bench.arms.unet(UNET, 8), bench.arms.unet(UNET, 8, low_only=True)
    assert torch.equal(full.reference, low.reference) and low.module is low.half
    for a, b, c in zip(full.module.parameters(), full.half.parameters(), low.half.parameters()):
        assert a.dtype == torch.float32 and torch.equal(a.bfloat16(), b) and torch.equal(b, c)


def test_attention_and_group_norm_agree_with_torch(bench, tmp_path):
    run = bench.work.Run(threads=1, repeats=1, cache=tmp_path, words=("torch", "ldmfast"))
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        rows = bench.work.attention_case(run, "small", (1, 3, 50, 24), dtype)[1]["arms"]
        assert rows["torch"]["error"] < limit and 0 < rows["ldmfast"]["error"] < limit


def test_openvino_attention_has_the_same_output(bench, tmp_path):
    pytest.importorskip("openvino", reason="openvino is in requirements-bench.txt, not in requirements-dev.txt")
    run = bench.work.Run(threads=1, repeats=1, cache=tmp_path, words=("OpenVINO",))
    row = bench.work.attention_case(run, "small", (1, 3, 50, 24), torch.float32)[1]["arms"]["OpenVINO"]
    assert 0 < row["error"] < 1e-5 and row["plugin"] == {"precision": "f32", "threads": 1}


def test_a_peer_that_is_not_installed_keeps_its_line(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    run = bench.work.Run(threads=1, repeats=1, cache=tmp_path, words=("OpenVINO bf16", "diffusers fp32"))
    case, entry = bench.work.unet_case(run, "small", UNET, 8)
    row = entry["arms"]["OpenVINO bf16"]
    assert "median_s" not in row and row["unavailable"].startswith("ModuleNotFoundError: import of openvino")
    assert "median_s" in entry["arms"]["diffusers fp32"]
    bench.peers.show(case, entry)
    assert "OpenVINO bf16        not available: ModuleNotFoundError" in capsys.readouterr().out


def test_arms_that_fail_say_why(bench):
    def refuse():
        raise RuntimeError("\nfirst line\nsecond line")

    wanted, pages = torch.tensor([3.0, 4.0]), mmap.mmap(-1, 64 << 20)  # pages that no heap had before

    def large():
        pages.write(bytes(64 << 20))
        pages.seek(0)
        return wanted

    rows = bench.race.race({
        "refuses": bench.race.Arm(refuse, "peer 1.0", "none"),
        "other shape": fixed(bench, torch.zeros(3)),
        "not finite": fixed(bench, torch.tensor([math.nan, 4.0])),
        "too large": bench.race.Arm(refuse, "peer 1.0", "none", need=1 << 60),
        "half": fixed(bench, wanted / 2, earlier_s=60.0),
        "large": bench.race.Arm(lambda: (large, {}), "peer 1.0", "none"),
    }, wanted, repeats=2)
    assert rows["refuses"]["unavailable"] == "RuntimeError: first line"
    assert rows["other shape"]["unavailable"] == "ValueError: output has shape (3,), the reference (2,)"
    assert rows["not finite"]["unavailable"] == "ValueError: output is not finite"
    if bench.race.free_memory() is not None:
        assert rows["too large"]["unavailable"].startswith("MemoryError: needs about 1073741825.0 GiB")
    assert rows["half"]["error"] == 0.5 and rows["half"]["startup_s"] >= 60
    if bench.race.forget_peak() is not None:
        assert rows["half"]["peak_added_bytes"] < 32 << 20 and rows["large"]["peak_added_bytes"] > 60 << 20


def test_conversions_are_kept_with_the_time_they_took(bench, tmp_path, monkeypatch):
    def save(model, path, compress_to_fp16):
        assert not compress_to_fp16
        path.parent.mkdir()
        path.write_text(model)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(save_model=save))
    path, seconds, there = bench.arms._kept(tmp_path / "cache", "net", lambda: "converted")
    assert path.read_text() == "converted" and seconds > 0 and not there
    again = bench.arms._kept(tmp_path / "cache", "net", lambda: pytest.fail("converted twice"))
    assert again == (path, seconds, True)
    with pytest.raises(KeyboardInterrupt):
        bench.arms._kept(tmp_path / "cache", "stopped", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["net"]


def case_of(**medians: float) -> dict:
    return {"note": "", "arms": {name: {"median_s": s, "repeats_s": [s]} for name, s in medians.items()}}


def test_records_of_one_commit_are_merged_and_others_replaced(bench, monkeypatch):
    def measure(work: str, median: float) -> dict:
        monkeypatch.setitem(bench.peers.WORK, work, lambda run: iter([(work, case_of(ldmfast=median))]))
        options = SimpleNamespace(work=[work], threads=1, repeats=5, arms=[], level=None, no_write=False)
        bench.peers.measure(options, Path("unused"))
        files = [p for p in bench.ops.RESULTS.rglob("*") if p.is_file()]
        assert [p.name for p in files] == ["peers.json"]  # and no temporary file beside it
        return json.loads(files[0].read_text())

    monkeypatch.setattr(bench.ops, "commit", lambda: "aaa")
    measure("tiny", 1.0)
    measure("vae", 2.0)
    record = measure("tiny", 3.0)
    assert {case: entry["arms"]["ldmfast"]["median_s"] for case, entry in record["cases"].items()} == {
        "tiny": 3.0, "vae": 2.0}
    assert record["threads"] == 1 and record["commit"] == "aaa" and record["cases"]["vae"]["repeats"] == 5
    assert {"device", "torch", "diffusers", "cpu_isa", "level", "environment"} <= set(record)
    monkeypatch.setattr(bench.ops, "commit", lambda: "bbb")
    assert list(measure("vae", 4.0)["cases"]) == ["vae"]


def test_ctrl_c_keeps_finished_cases(bench, monkeypatch, capsys):
    def interrupted(run):
        yield "done", case_of(ldmfast=1.0)
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.peers.WORK, "tiny", interrupted)
    options = SimpleNamespace(work=["tiny", "vae"], threads=1, repeats=5, arms=[], level=None, no_write=False)
    assert list(bench.peers.measure(options, Path("unused"))["cases"]) == ["done"]
    assert list(json.loads(next(bench.ops.RESULTS.rglob("peers.json")).read_text())["cases"]) == ["done"]
    assert "stopped" in capsys.readouterr().out


def test_targets_compare_medians_of_one_case(bench):
    cases = {"sd15": case_of(**{"ldmfast bf16": 2.0, "diffusers bf16": 4.0, "torch.compile bf16": 2.5})}
    cases["sd15"]["arms"]["ldmfast bf16"]["startup_s"] = 6.0
    cases["sd15"]["arms"]["OpenVINO bf16"] = {"unavailable": "ModuleNotFoundError: no openvino"}
    cases["group_norm_silu bf16 2x320x64x64"] = case_of(**{"ldmfast": 4.0, "plain copy": 1.0})
    found = {(t.arm, t.measure, t.peer): (bench.peers.value(t, cases), bench.peers.met(t, bench.peers.value(t, cases)))
             for t in bench.peers.TARGETS if t.case in cases}
    assert found["ldmfast bf16", "faster", "diffusers bf16"] == (2.0, True)
    assert found["ldmfast bf16", "faster", "torch.compile bf16"] == (1.25, False)
    assert found["ldmfast bf16", "faster", "OpenVINO bf16"] == (None, None)
    assert found["ldmfast bf16", "startup_s", ""] == (6.0, False)
    assert found["ldmfast int8", "faster", "diffusers bf16"] == (None, None)
    assert found["ldmfast", "slower", "plain copy"] == (4.0, True)


def test_every_target_names_a_case_that_is_measured(bench):
    cases = {f"attention bf16 {shape}" for shape in bench.work.ATTENTION} | {"group_norm_silu bf16 2x320x64x64"}
    cases |= {"sd15", "sdxl", "vae", "tiny", "load", "dit", "pixart", "sd3", "flux"}
    assert {t.case for t in bench.peers.TARGETS} == cases


def test_load_counts_the_numbers_of_a_folder(bench):
    load = importlib.import_module("load")
    tiny = bench.e2e.TINY
    header = load.stored_elements(tiny)
    assert 4e6 < header * 2 < sum(f.stat().st_size for f in tiny.rglob("*.safetensors"))


def test_the_chart_draws_a_record(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in requirements-bench.txt, not in requirements-dev.txt")
    cases = {"sd15": case_of(**{"ldmfast bf16": 2.0, "diffusers fp32": 9.0}), "attention": case_of(ldmfast=0.1)}
    cases["sd15"]["arms"]["OpenVINO bf16"] = {"unavailable": "ModuleNotFoundError: no openvino"}
    record = {"device": "cpu here", "threads": 2, "level": "all the CPU has", "cases": cases}
    picture = bench.chart.draw(record, tmp_path / "peers.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
