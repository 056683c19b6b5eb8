"""Plans, their measurement, the stored file, and int8 networks end to end."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import ldmfast
from ldmfast.checkpoints import safetensors
from ldmfast.cli import app
from ldmfast.errors import CheckpointError, LdmfastError, PrecisionError
from ldmfast.models.gemm import Conv2d, Linear
from ldmfast.models.unet_2d_condition import UNet2DCondition
from ldmfast.quantization import Plan, Range, can_be_int8, choose, quantize, store
from ldmfast.quantization.measure import Meter, decibel, thirds

TINY = Path(ldmfast.__file__).parent / "assets" / "tiny"
CONFIG = {"sample_size": 8, "block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "cross_attention_dim": 24,
          "attention_head_dim": 4, "norm_num_groups": 8}
INF = float("inf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {k: v.clone() for k, v in UNet2DCondition.from_config(CONFIG).state_dict().items()}


def unet(plan: Plan | None, given: dict[str, Tensor] | None = None) -> UNet2DCondition:
    return UNet2DCondition.from_weights(CONFIG, given or weights(), pack=True, int8=plan, dtype=torch.bfloat16)


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 9, 7, generator=g).bfloat16(), torch.randn(2, 5, 24, generator=g).bfloat16()


def run(model: UNet2DCondition, t: float = 500.0) -> Tensor:
    x, text = inputs()
    return model(x, t, text).float()


def layers(model: nn.Module) -> dict[str, Linear | Conv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (Linear, Conv2d))}


def test_plan_survives_json_and_says_what_each_layer_needs() -> None:
    ranges = (Range(300.0, frozenset({"a", "b"})), Range(INF, frozenset({"a"})))
    plan = Plan(ranges, {"a": (1.0, 2.0), "b": (3.0, 40.0)})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert [plan.at(t) for t in (0, 299.9, 300, 999)] == [0, 0, 1, 1]
    needs = {n: (plan.needs_int8(n), plan.needs_float(n)) for n in ("a", "b", "c", "conv_in")}
    assert needs == {"a": (False, True), "b": (True, True), "c": (True, False), "conv_in": (False, True)}


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"ranges": [], "sqnr": null}', '{"ranges": [{"below": 3, "kept": []}], "sqnr": null}',
    '{"ranges": [{"below": null, "kept": 7}], "sqnr": null}',
    '{"ranges": [{"below": 9, "kept": []}, {"below": 3, "kept": []}, {"below": null, "kept": []}], "sqnr": null}',
    '{"ranges": [{"below": null, "kept": []}], "sqnr": [1]}'])
def test_damaged_plan_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="int8 plan"):
        Plan.from_json(text)


def test_choose_keeps_what_is_below_the_threshold_and_merges_equal_ranges() -> None:
    sqnr = {"a": (10.0, 30.0, 30.0), "b": (40.0, 40.0, 40.0), "c": (float("nan"), 40.0, 40.0)}
    plan = choose(sqnr, [100.0, 200.0, INF], 20.0)
    assert [(r.below, set(r.kept)) for r in plan.ranges] == [(100.0, {"a", "c"}), (INF, set())]


def test_thirds() -> None:
    assert thirds([float(t) for t in range(9)]) == [3.0, 6.0, INF]
    assert thirds([5.0]) == [INF]


def test_default_plan_makes_every_block_int8_and_keeps_ends() -> None:
    found = layers(unet(Plan()))
    int8 = {n for n, m in found.items() if m.int8 is not None}
    assert int8 == {n for n in found if can_be_int8(n)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= found.keys() - int8
    assert all(found[n].weight is None for n in int8)
    assert {n.rsplit(".", 1)[-1] for n in int8} >= {"to_qkv", "to_q", "proj", "2", "conv1", "conv2", "conv", "proj_in"}


def test_int8_network_is_close_and_not_the_same() -> None:
    exact, eight = run(unet(None)), run(unet(Plan()))
    signal, noise = float(exact.square().sum()), float((eight - exact).square().sum())
    assert 25 < decibel(signal, noise) < 60


def test_a_mixed_plan_switches_by_timestep() -> None:
    kept = frozenset(n for n in layers(unet(None)) if "down_blocks" in n)
    mixed = unet(Plan((Range(300.0, kept), Range(INF, frozenset()))))
    low, high = unet(Plan((Range(INF, kept),))), unet(Plan())
    assert torch.equal(run(mixed, 100.0), run(low, 100.0))
    assert torch.equal(run(mixed, 700.0), run(high, 700.0))
    assert not torch.equal(run(low, 100.0), run(high, 100.0))
    # pictures of both ranges in one call: the more careful network
    x, text = inputs()
    both = mixed(x, torch.tensor([100.0, 700.0]), text)
    assert torch.equal(both, low(x, torch.tensor([100.0, 700.0]), text))


def test_variants_share_their_tensors() -> None:
    kept = frozenset(n for n in layers(unet(None)) if "mid_block" in n)
    mixed = unet(Plan((Range(300.0, kept), Range(INF, frozenset()))))
    own = {id(t) for t in (*mixed.parameters(), *mixed.buffers())}
    for variant in mixed.variants:
        assert {id(t) for t in (*variant.parameters(), *variant.buffers())} <= own


def test_sqnr_is_that_of_the_definition_and_near_theory() -> None:
    """Uniform rounding of b bits to a range of r sigma: noise r^2 / (12 * 4^b); activation and weight noise add."""
    model = unet(None)
    x, text = inputs()
    meter = Meter(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv"
    layer = layers(model)[name]
    handle = layer.register_forward_hook(lambda m, a, o: seen.__setitem__(name, (a[0].double(), o.double())))
    with meter.watching():
        model(x, 500.0, text)
    handle.remove()
    a, out = seen[name]
    w = layer.dense().double()
    step_a = (a.max().clamp(min=0) - a.min().clamp(max=0)) / 255
    qa = ((a / step_a).round()) * step_a
    step_w = w.abs().amax(1, keepdim=True) / 127
    qw = (w / step_w).round() * step_w
    wanted = decibel(float(out.square().sum()), float((F.linear(qa, qw) - out).square().sum()))
    assert abs(meter.sqnr([INF])[name][0] - wanted) < 0.3
    rounding = step_a**2 / 12 * w.square().sum(1).mean() + (step_w**2).mean() / 12 * a.square().sum(-1).mean()
    assert wanted >= decibel(float(F.linear(a, w).square().mean()), float(rounding)) - 1


def test_a_layer_with_outliers_is_flagged() -> None:
    spoiled = weights()
    name = "up_blocks.1.resnets.0.conv1"
    spoiled["up_blocks.1.resnets.0.norm1.weight"][3] = 3000.0
    spoiled[f"{name}.weight"][:, 3] /= 3000.0  # what the channel says is as before
    model = unet(None, spoiled)
    meter = Meter(model)
    with meter.watching():
        run(model)
    sqnr = meter.sqnr([INF])
    assert min(sqnr, key=lambda n: sqnr[n][0]) == name
    plan = choose(sqnr, [INF], sorted(row[0] for row in sqnr.values())[1])
    assert plan.ranges[0].kept == {name}
    exact = run(model)
    errors = {p: float((run(unet(q, spoiled)) - exact).norm()) for p, q in {"mixed": plan, "uniform": Plan()}.items()}
    assert errors["mixed"] < errors["uniform"]


def test_hooks_are_gone_after_measuring() -> None:
    model = unet(None)
    meter = Meter(model)
    with meter.watching():
        run(model)
    count = dict(meter.energies)
    run(model, 7.0)
    assert dict(meter.energies) == count and not model._forward_pre_hooks


def test_stored_network_equals_the_one_made_from_weights(tmp_path: Path) -> None:
    kept = frozenset({"mid_block.resnets.0.conv1"})
    for plan in (Plan(), Plan((Range(300.0, kept), Range(INF, frozenset()))), Plan((Range(INF, kept),))):
        file = tmp_path / store.NAME
        store.save(file, UNet2DCondition.from_weights(CONFIG, weights()), plan, "f")
        assert [f.name for f in tmp_path.iterdir()] == [store.NAME]
        found, fingerprint, header = store.read_plan(file)
        assert fingerprint == "f" and found == plan
        stored = store.load(UNet2DCondition, CONFIG, header, found)
        made = unet(plan)
        for t in (100.0, 700.0):
            assert torch.equal(run(stored, t), run(made, t))


def test_stored_file_is_checked(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / store.NAME
    store.save(file, UNet2DCondition.from_weights(CONFIG, weights()), Plan(), "f")
    tensors, plan = load_file(file), Plan().to_json()
    conv = "mid_block.resnets.0.conv1.int8"
    bad = {
        "missing": {k: v for k, v in tensors.items() if k != "conv_out.bias"},
        "do not fit the plan": {k: v for k, v in tensors.items() if k != f"{conv}.scale"},
        "the config asks for": tensors | {f"{conv}.values": tensors[f"{conv}.values"][:5].clone()},
        "fit the plan": tensors | {f"{conv}.scale": tensors[f"{conv}.scale"].double()},
        "no such tensor": tensors | {"more.weight": torch.zeros(1)},
    }
    for message, content in bad.items():
        save_file(content, file, {"ldmfast_int8": plan, "weights": "f"})
        found, _, header = store.read_plan(file)
        with pytest.raises(CheckpointError, match=message):
            store.load(UNet2DCondition, CONFIG, header, found)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="holds no int8 plan"):
        store.read_plan(file)


def test_quantize_writes_a_file_that_loading_finds(folder: Path) -> None:
    report = quantize(folder, prompts=["a red circle", "two blue squares"], steps=4, progress=False)
    assert report.file == folder / "unet" / store.NAME and len(report.ends) == 3
    assert "SQNR" in str(report) and "ff.net.2" in report.table()
    stored = ldmfast.Pipeline.from_pretrained(folder, precision="int8")
    default = ldmfast.Pipeline.tiny(precision="int8")
    call = {"num_inference_steps": 3, "generator": 1, "output_type": "np", "progress": False}
    assert (stored("a red circle", **call).images == default("a red circle", **call).images).all()
    sizes = {f.name: f.stat().st_size for f in (folder / "unet").iterdir()}
    held = sum(e.nbytes for e in safetensors.read_header(report.file).tensors.values())
    assert held < 0.65 * max(v for k, v in sizes.items() if k != store.NAME)  # half, but for the ends in bf16


def test_a_stored_file_of_other_weights_is_said_and_not_used(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize(folder, prompts=["a red circle"], steps=2, progress=False)
    file = next(f for f in (folder / "unet").glob("*.safetensors") if f.name != store.NAME)
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    tensors["conv_out.bias"] += 1
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="made from other weights"):
        ldmfast.Pipeline.from_pretrained(folder, precision="int8")


def test_a_mixed_plan_draws_between_bf16_and_int8(folder: Path) -> None:
    call = {"num_inference_steps": 6, "generator": 2, "output_type": "np", "progress": False}
    quantize(folder, prompts=["a red circle"], steps=3, least=INF, progress=False)  # nothing is good enough for 8 bits
    all_bf16 = ldmfast.Pipeline.from_pretrained(folder, precision="int8")("a red circle", **call).images
    bf16 = ldmfast.Pipeline.tiny(precision="bf16")("a red circle", **call).images
    assert (all_bf16 == bf16).all()


def test_command_line(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    arguments = ["quantize", str(folder), "--prompts", str(prompts), "--steps", "2", "--report", "--quiet"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "SQNR in dB" in done.output and "runs in" in done.output and store.NAME in done.output
    assert CliRunner().invoke(app, ["quantize", str(tmp_path / "none"), "--quiet"]).exit_code == 2
    prompts.write_bytes(b"\xff\xfe\x00")
    failed = CliRunner().invoke(app, ["quantize", str(folder), "--prompts", str(prompts), "--quiet"])
    assert failed.exit_code == 2 and "not a readable text file" in failed.output


def test_bad_input() -> None:
    with pytest.raises(LdmfastError, match="at least one prompt"):
        quantize(TINY, prompts=[])
    with pytest.raises(PrecisionError, match="contradict"):
        ldmfast.Pipeline.tiny(precision="int8", dtype=torch.float32)
    with pytest.raises(PrecisionError, match="'int8'"):
        ldmfast.Pipeline.tiny(precision="int4")


def test_threads_share_an_int8_pipeline() -> None:
    from concurrent.futures import ThreadPoolExecutor

    pipe = ldmfast.Pipeline.tiny(precision="int8")

    def draw(i: int) -> object:
        return pipe("a red circle", num_inference_steps=2 + i % 3, generator=i, output_type="np", progress=False).images

    serial = [draw(i) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(draw, range(6)))
    assert all((a == b).all() for a, b in zip(serial, parallel))


def test_plan_json_is_json() -> None:
    value = json.loads(Plan().to_json())
    assert value == {"ranges": [{"below": None, "kept": []}], "sqnr": None}
    assert math.isinf(Plan.from_json(json.dumps(value)).ranges[0].below)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ldmfast.Pipeline.tiny(precision="int8")


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_thread_count_changes_rounding_at_most(precision: str) -> None:
    """A library may sum in another order with other threads; more than that must not happen."""
    dtype = torch.float32 if precision == "exact" else torch.bfloat16
    model = UNet2DCondition.from_weights(CONFIG, weights(), pack=True, dtype=dtype,
                                         int8=Plan() if precision == "int8" else None)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(model))
    finally:
        torch.set_num_threads(before)
    limit = 1e-5 if precision == "exact" else 2e-2
    assert all((other - found[0]).abs().max() <= limit * found[0].abs().max() for other in found[1:])
