"""certify, settings in calls and files, and the guard, on the shipped model."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

import ldmfast
from ldmfast.caches import EasyCache, FirstBlock, Guard, TaylorSeer, TeaCache, TGate, from_settings
from ldmfast.guidance import CFG
from ldmfast.pipelines import output
from ldmfast.tuning import Promise, Settings

PROMPTS = ["a red circle above a blue square", "two green triangles", "a large green ring"]
SHORT = Settings(steps=6)
CALL = {"num_inference_steps": 6, "generator": 4, "progress": False, "output_type": "latent"}


def promise(**other) -> Promise:
    return Promise(**{"measure": "psnr", "limit": 30.0, "bound": 31.25, "mean": 33.0, "worst": 24.0, "held_out": 20,
                      "new": 100, "confidence": 0.95, "share": 0.9, "share_bound": 0.72, "one": 25.0, "finalists": 2,
                      "speedup": 2.5, "made": {"height": 64}, **other})


@pytest.fixture(scope="module")
def cached(tiny):
    fast = Settings(steps=6, cache=(TaylorSeer(interval=2, on="output"), ))
    return tiny.certify(PROMPTS, fast, reference=SHORT, batch=2, progress=False)


def test_exact_against_exact_is_equal(tiny):
    report = tiny.certify(PROMPTS, SHORT, reference=SHORT, batch=2, progress=False)
    assert all(map(math.isinf, report.psnr)) and set(report.ssim) == {1.0}
    assert {e for row in report.latent_errors for e in row} == {0.0} and len(report.latent_errors) == 6
    assert report.reference.attributes == report.fast.attributes and report.fast.evaluations == 6
    assert "PSNR" in str(report) and "inf" in str(report)


def test_evaluations_are_the_networks_calls(tiny, cached, monkeypatch):
    """Counted beside it: two branches run together, pictures one by one in exact precision."""
    seen = []
    forward = type(tiny.unet).forward
    monkeypatch.setattr(type(tiny.unet), "forward", lambda self, x, *a, **k: (seen.append(len(x)),
                                                                              forward(self, x, *a, **k))[1])
    own = tiny(PROMPTS, **CALL | {"generator": 0}, cache=TaylorSeer(interval=2, on="output"))
    assert cached.fast.evaluations == len(seen) / 3 == own.report.evaluations[0] == 4
    assert cached.fast.rows == sum(seen) / 3 == 8
    assert cached.reference.evaluations == 6 and cached.reference.rows == 12
    other = tiny.certify(PROMPTS, Settings(precision="bf16", steps=5, solver="heun"), reference=SHORT, batch=3,
                         progress=False)
    assert other.fast.evaluations == 9 and other.fast.rows == 18 and len(other.levels) == len(other.latent_errors) < 6


def test_what_is_reported_is_what_the_calls_drew(tiny, cached):
    exact, fast = (tiny(PROMPTS, **CALL | {"generator": 0, "output_type": "np"}, cache=c).images.astype("float64")
                   for c in (None, TaylorSeer(interval=2, on="output")))
    expected = -10 * torch.log10(torch.as_tensor((exact - fast) ** 2).flatten(1).mean(1))
    assert list(cached.psnr) == pytest.approx(expected.tolist(), abs=1e-3)
    x, y = (tiny(PROMPTS, **CALL | {"generator": 0}, cache=c).images.double()
            for c in (None, TaylorSeer(interval=2, on="output")))
    assert list(cached.latent_error) == pytest.approx(((x - y).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
                                                       ).tolist(), rel=1e-5)
    assert cached.latent_errors[0] == (0.0, 0.0, 0.0) and cached.latent_errors[2][0] > 0  # computed, computed, forecast
    arm = cached.fast
    assert sum(arm.parts.values()) == pytest.approx(arm.seconds, rel=0.5) and len(arm.step_seconds) == 6
    row = cached.summary()["psnr"]
    assert row["bound"] < row["mean"] and row["worst"] == min(cached.psnr)


def test_a_judge_of_ones_own(tiny):
    def judge(pictures, prompts):
        return [{"dark": bool(p.mean() < 2), "red": "red" in text} for p, text in zip(pictures, prompts)]

    report = tiny.certify(["anything", "red"], SHORT, reference=SHORT, judge=judge, progress=False)
    assert report.fast.attributes == {"dark": 1.0, "red": 0.5}
    assert tiny.certify(["anything"], SHORT, reference=SHORT, progress=False).notes[0].startswith("attributes: not")


def test_a_saved_certificate_is_whole_or_absent(cached, tmp_path, monkeypatch):
    files = cached.save(tmp_path / "new")
    assert [f.name for f in files] == ["certificate.png", "certificate.html", "certificate.json"]
    row = json.loads(files[2].read_text())
    assert row["psnr"] == list(cached.psnr) and row["fast"]["evaluations"] == 4
    page = files[1].read_text()
    assert "data:image/png;base64," in page and "http" not in page and PROMPTS[0] in page
    before = {f.name: f.read_bytes() for f in files}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cached.save(tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        SHORT.save(tmp_path / "settings.json")
    assert {f.name: f.read_bytes() for f in (tmp_path / "new").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["new"]


def test_settings_go_into_a_file_and_back(tmp_path):
    guarded = Guard(policy=TeaCache(threshold=0.4), limit=1.5)
    settings = Settings(precision="int8", solver="dpmpp_2m", steps=10, cache=(guarded, TGate(gate=6)),
                        guidance=CFG(stop=0.75),
                        promise=promise(), model="m", version="v", device="cpu", notes=("one",))
    assert Settings.load(settings.save(tmp_path / "s.json")) == settings
    assert "CFG(stop=0.75), Guard(policy=TeaCache(threshold=0.4), limit=1.5)" in str(settings)
    assert "31.2 dB" in str(settings)
    (tmp_path / "half.json").write_text((tmp_path / "s.json").read_text()[:200])
    for broken in ("half.json", "absent.json"):
        with pytest.raises(ldmfast.LdmfastError, match=broken):
            Settings.load(tmp_path / broken)


def test_settings_in_a_call(tiny):
    settings = Settings(precision="bf16", solver="euler", steps=5, cache=FirstBlock(threshold=0.3))
    out = tiny(PROMPTS, generator=4, progress=False, output_type="latent", settings=settings)
    other = ldmfast.Pipeline.tiny(precision="bf16")
    same = other(PROMPTS, **CALL | {"num_inference_steps": 5}, solver="euler", cache=FirstBlock(threshold=0.3))
    assert torch.equal(out.images, same.images) and out.report.promise == "nothing: the settings were not tuned"
    assert not next(other.unet.parameters()).is_inference() and tiny.precision == "exact"
    assert not next(tiny.siblings["bf16"].unet.parameters()).is_inference()
    less = tiny.certify(PROMPTS[:1], Settings(steps=6, guidance=CFG(stop=0.5)), reference=SHORT, progress=False)
    assert less.fast.evaluations == 6 and less.fast.rows == 9 and less.reference.rows == 12
    with pytest.raises(ldmfast.LdmfastError, match="solver was given beside settings"):
        tiny(PROMPTS[0], solver="ddim", settings=settings)
    with pytest.raises(ldmfast.LdmfastError, match="has not been tuned"):
        tiny(PROMPTS[0], settings="auto")
    with pytest.raises(ldmfast.LdmfastError, match="neither 'auto' nor"):
        tiny(PROMPTS[0], settings={"steps": 3})


def test_a_promise_is_for_its_model_version_device_and_call(tiny, tmp_path):
    """For the arguments of the measured call alone: whatever else is given beside the settings, nothing is promised."""
    from ldmfast.tuning.measure import draw
    from ldmfast.tuning.settings import conditions, identity

    measured = draw(tiny, Settings(steps=2, cache=(TaylorSeer(interval=(0,), on="output"),)), PROMPTS[:2], [7, 8], {})
    own = Settings(steps=2, cache=TaylorSeer(interval=(0,), on="output"), promise=promise(
        made=conditions(measured.made)), model=identity(tiny), version=ldmfast.__version__, device="cpu")
    own = Settings.load(own.save(tmp_path / "s.json"))
    call = {"progress": False, "output_type": "latent", "generator": 0}
    kept = tiny("a red circle", settings=own, **call)
    assert kept.report.promise.startswith("mean PSNR >= 30.0 dB over 100 unseen")
    assert kept.report.promise.endswith("of all at least 72%, corrected for 2 settings tested)")
    for name, value, told in (
            ("height", 32, "height 64, here 32"), ("guidance_scale", 5, "guidance_scale 3.0, here 5.0"),
            ("guidance", CFG(stop=0.5), "guidance [], here [{"), ("solver", "euler", "solver 'ddim', here 'euler'"),
            ("guidance_rescale", 0.5, "guidance_rescale 0.0, here 0.5"), ("eta", 0.5, "eta 0.0, here 0.5"),
            ("negative_prompt", "blue", "negative_prompt '', here 'blue'"), ("clip_skip", 1, "clip_skip None, here 1"),
            ("latents", torch.zeros(1, 8, 8, 8), "out latents")):
        found = tiny("a red circle", settings=own, **call, **{name: value}).report.promise
        assert found.startswith("nothing: tuned with" + " " * (name != "latents") + told), (name, found)
    report = tiny.certify(PROMPTS[:1], own, reference=SHORT, progress=False)
    other = tiny.certify(PROMPTS[:1], own, reference=SHORT, progress=False, negative_prompt="blue")
    assert report.promise == str(own.promise) and other.promise.startswith("nothing: tuned with negative_prompt")
    for name in ("model", "version", "device"):
        other = Settings(steps=3, promise=promise(), **{"model": own.model, "version": own.version, "device": "cpu",
                                                        name: "another"})
        with pytest.raises(ldmfast.LdmfastError, match=f"tuned for .*{name.split('_')[0]}.* another, here"):
            tiny("a red circle", settings=other, **call)


def test_a_model_that_changes_is_another(tmp_path, tiny):
    """What is kept beside a model is refused when its weights or a config change."""
    import shutil

    from ldmfast.pipelines.load import ASSETS
    from ldmfast.tuning.settings import beside, identity

    folder = shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    pipe = ldmfast.Pipeline.from_pretrained(folder)
    own = Settings(steps=3, promise=promise(), model=identity(pipe), version=ldmfast.__version__, device="cpu")
    own.save(beside(pipe))
    call = {"progress": False, "output_type": "latent", "generator": 0, "settings": "auto"}
    assert ldmfast.Pipeline.from_pretrained(folder)("a circle", **call).settings[0]["num_inference_steps"] == 3
    config = folder / "scheduler" / "scheduler_config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "beta_end": 0.013}))
    with pytest.raises(ldmfast.LdmfastError, match="tuned for model"):
        ldmfast.Pipeline.from_pretrained(folder)("a circle", **call)
    config.write_text(json.dumps(text))
    weights = next((folder / "unet").glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    with pytest.raises(ldmfast.LdmfastError, match="tuned for model"):
        ldmfast.Pipeline.from_pretrained(folder)("a circle", **call)
    assert beside(tiny) is None and beside(ldmfast.Pipeline.from_pretrained(ASSETS / "tiny")) is None


@pytest.mark.parametrize("policy, kind", [(FirstBlock(threshold=0.8), "tail"), (TeaCache(threshold=0.8), "stack"),
                                          (EasyCache(threshold=0.8), "output")], ids=str)
def test_a_guard_keeps_its_budget(tiny, policy, kind):
    call = CALL | {"num_inference_steps": 8}
    free = tiny(PROMPTS[:2], **call, cache=policy)
    off = tiny(PROMPTS[:2], **call, cache=Guard(policy=policy, limit=math.inf))
    assert torch.equal(off.images, free.images)
    used = [g.used for g in off.report.guards]
    assert len(used) == 2 and min(used) > 0 and all(g.forced == 0 for g in off.report.guards)
    half = tiny(PROMPTS[:2], **call, cache=Guard(policy=policy, limit=min(used) / 2))
    assert all(g.used <= min(used) / 2 and g.forced > 0 for g in half.report.guards)
    assert half.report.reused.get(kind, 0) < off.report.reused[kind]
    none = tiny(PROMPTS[:2], **call, cache=Guard(policy=policy, limit=0))
    assert torch.equal(none.images, tiny(PROMPTS[:2], **call).images) and not none.report.reused.get(kind)


@pytest.mark.parametrize("schedule", [{"stop": 0.5}, {"schedule": [5.0] * 4 + [1.0] * 4 + [5.0] * 4}], ids=str)
def test_a_guards_budget_goes_on_where_the_branches_change(tiny, monkeypatch, schedule):
    """Against the sum of all that its indicator said of evaluations left out."""
    from ldmfast.caches import guard

    spent, needed = [], guard._Guarded.needed

    def counted(self, step, indicator):
        found = needed(self, step, indicator)
        if not found:
            spent.append(self.inner.value)
        return found

    monkeypatch.setattr(guard._Guarded, "needed", counted)
    call = CALL | {"num_inference_steps": 12, "solver": "ddim", "guidance": CFG(scale=5, **schedule)}
    (free,) = tiny(PROMPTS[0], **call, cache=Guard(policy=EasyCache(threshold=1.0), limit=math.inf)).report.guards
    assert free.used == pytest.approx(sum(spent)) and free.used > 0.7
    spent.clear()
    (used,) = tiny(PROMPTS[0], **call, cache=Guard(policy=EasyCache(threshold=1.0), limit=0.7)).report.guards
    assert 0 < sum(spent) <= 0.7 and used.used == pytest.approx(sum(spent))


def test_a_guard_in_settings_and_beside_t_gate(tiny):
    guard = Guard(policy=FirstBlock(threshold=0.8), limit=0.7)
    assert from_settings([json.loads(json.dumps(guard.to_dict()))]) == (guard,)
    out = tiny(PROMPTS[0], **CALL, cache=[guard, TGate(gate=3)])
    assert 0 < out.report.guards[0].used <= 0.7  # counted on over the end of guidance
    assert tiny(PROMPTS[0], **CALL | {"output_type": "pil"}, cache=guard).settings[0]["repeatable"]
    for policy in (TaylorSeer(), guard, None):
        with pytest.raises(ldmfast.LdmfastError, match="only FirstBlock, TeaCache and EasyCache"):
            Guard(policy=policy, limit=1.0)


@pytest.mark.parametrize("arguments, words", [
    ({"timesteps": 5}, "timesteps=5 is not a list of numbers"), ({"timesteps": ["a"]}, "is not a list of numbers"),
    ({"loras": 3}, "loras=3 is not a table"), ({"loras": "style"}, "loras='style' is not a table"),
    ({"precision": "fp16"}, "precision='fp16' is none of"), ({"solver": 5}, "solver=5 is not a name"),
    ({"guidance_scale": "3"}, "guidance_scale='3' is not a finite number")])
def test_what_settings_refuse(arguments, words):
    with pytest.raises(ldmfast.LdmfastError, match=words):
        Settings(**arguments)


@pytest.mark.parametrize("family", ["FluxPipeline", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("settings, name", [(Settings(loras={"a": 1.0}), "loras"),
                                            (Settings(timesteps=[999, 499]), "timesteps")], ids=["loras", "timesteps"])
def test_arguments_that_a_family_does_not_take_are_named(tiny, family, settings, name):
    from ldmfast.pipelines import flux, sd3
    from ldmfast.tuning.settings import resolve

    pipe = getattr(flux if family == "FluxPipeline" else sd3, family)(tiny.loaded, precision="exact",
                                                                      device=tiny.device, source="x")
    with pytest.raises(ldmfast.LdmfastError, match=f"{family} takes no {name}"):
        pipe("a", settings=settings)
    with pytest.raises(ldmfast.LdmfastError, match=f"{family} takes no {name}"):
        pipe.certify(["a"], Settings(), reference=settings, progress=False)
    with pytest.raises(ldmfast.LdmfastError, match=f"{family} takes no {name}"):
        pipe.tune(["a"] * 24, min_psnr=30, reference=settings, progress=False)
    assert resolve(pipe, Settings(steps=3)) == Settings(steps=3)


def test_another_precision_is_drawn_as_this_pipeline_is(tiny, monkeypatch):
    """Tiling and eager calls of one copy are not another's."""
    import copy

    from ldmfast.tuning.settings import in_precision

    with_engine, plain = copy.copy(tiny), copy.copy(tiny)
    with_engine.vae_tiling, with_engine.engine, plain.engine = True, object(), None
    in_precision(plain, "bf16")
    monkeypatch.setattr(tiny.siblings["bf16"], "engine", kept := object())
    tiled, eager = in_precision(with_engine, "bf16"), in_precision(plain, "bf16")
    assert (tiled.vae_tiling, eager.vae_tiling) == (True, False) and tiled.loaded is eager.loaded
    assert tiled.engine is kept and eager.engine is None and tiny.siblings["bf16"].vae_tiling is False


def test_what_certify_refuses(tiny):
    for prompts, words in ("a red circle", "list of at least one"), ([], "list of at least one"):
        with pytest.raises(ldmfast.LdmfastError, match=words):
            tiny.certify(prompts, SHORT)
    with pytest.raises(ldmfast.LdmfastError, match="2 seeds for 1 prompts"):
        tiny.certify(["a"], SHORT, seeds=[1, 2])
    with pytest.raises(ldmfast.LdmfastError, match="num_inference_steps is set by"):
        tiny.certify(["a"], SHORT, num_inference_steps=4, progress=False)
