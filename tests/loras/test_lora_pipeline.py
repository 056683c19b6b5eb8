"""LoRA in whole pipelines: pictures against diffusers', methods, batches, threads, and what a swap leaves behind."""

from __future__ import annotations

import threading

import lora_cases as make
import pytest
import resident
import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from safetensors.torch import save_file

import ldmfast
from ldmfast.errors import LdmfastError

CALL = {"prompt": make.PROMPT, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
CYCLES = 1000


@pytest.fixture(scope="module")
def theirs():
    return make.diffusers_pipeline()


@pytest.fixture(scope="module")
def files(theirs, tmp_path_factory):
    """Two LoRAs of the attentions (names, matrices, files in kohya's layout)."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for seed, name in enumerate("ab"):
        lora = make.draw(theirs, seed, strength=0.1, wanted=lambda n: "attn" in n or "mlp" in n)
        save_file(make.kohya(lora), folder / f"{name}.safetensors")
        found[name] = (lora, folder / f"{name}.safetensors")
    return found


def loaded(files, precision="exact"):
    pipe = ldmfast.Pipeline.tiny(precision=precision)
    for name, (_, file) in files.items():
        pipe.load_lora_weights(file, name)
    return pipe


def ours(pipe, seed=7, **more):
    return pipe(**CALL | {"generator": seed, "progress": False} | more).images


def expected(theirs, *loras):
    return make.merged(theirs, *loras)(**CALL, generator=torch.Generator().manual_seed(7)).images


def test_pictures_are_those_of_the_dense_sum(theirs, files):
    """Weights, blocks (expanded by diffusers' own function), fusing, in every order: within 1e-4 of diffusers."""
    (a, _), (b, _) = files["a"], files["b"]
    pipe = loaded(files)
    assert pipe.get_active_adapters() == ["b"], "as in diffusers the last one loaded is active"
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    plain = expected(theirs)

    def check(*loras, **more):
        wanted = expected(theirs, *loras)
        assert not loras or (wanted - plain).abs().max() > 0.05, "the adapters must be seen"
        assert (ours(pipe, **more) - wanted).abs().max() <= 1e-4

    check((b, 1.0))
    pipe.set_adapters(["a", "b"], [0.6, -0.4])
    check((a, 0.6), (b, -0.4))
    check((a, 0.3), loras={"a": 0.3})
    check(loras={})
    blocks = {"down": 0.5, "mid": 0.0, "up": {"block_0": [0.2, 1.5], "block_1": 2}}
    pipe.set_adapters("a", {"unet": blocks, "text_encoder": 0.25})
    [scales] = _maybe_expand_lora_scales(theirs.unet, [blocks])

    def weight(name):
        if name.startswith("text_encoder"):
            return 0.25
        return next(w for block, w in scales.items() if block in name)

    check((a, weight))
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.get_active_adapters() == ["a"]
    check((a, lambda n: weight(n) / 2))
    check((a, lambda n: weight(n) / 2), (b, 0.7), loras={"b": 0.7})
    pipe.unfuse_lora(["text_encoder"])
    check((a, lambda n: weight(n) / (1 if n.startswith("text") else 2)))
    pipe.disable_lora()
    check((a, lambda n: 0 if n.startswith("text") else weight(n) / 2))
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    check((a, lambda n: 0 if n.startswith("text") else weight(n) / 2))
    pipe.unfuse_lora()
    check()


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_a_batch_with_different_adapters(files, precision):
    """Pictures are, bit for bit, those of calls with their adapters alone; and afterwards the base's are the base's."""
    base = ldmfast.Pipeline.tiny(precision=precision)
    pipe = loaded(files, precision)
    pipe.set_adapters("a")
    each = ["b", None, {"a": 0.5, "b": 0.5}, "b"]
    prompts = [make.PROMPT, "a green ring", "a green ring", "three blue squares"]
    batch = ours(pipe, [1, 2, 3, 4], prompt=prompts, loras=each)
    pair = ours(pipe, [1, 4], prompt=[prompts[0], prompts[3]], loras="b")
    assert torch.equal(batch[[0, 3]], pair)
    assert torch.equal(batch[1:2], ours(base, [2], prompt=prompts[1]))
    assert torch.equal(batch[2:3], ours(pipe, [3], prompt=prompts[2], loras=each[2]))
    assert not torch.equal(batch[1:2], ours(pipe, [2], prompt=prompts[1])), "the adapters must be seen"
    pipe.fuse_lora()
    fused = ours(pipe, prompt=prompts[0])
    pipe.unload_lora_weights()
    assert torch.equal(ours(pipe, prompt=prompts[0]), fused) and not torch.equal(fused, ours(base, prompt=prompts[0]))
    pipe.unfuse_lora()
    assert torch.equal(ours(pipe, prompt=prompts[0]), ours(base, prompt=prompts[0]))
    assert all(m is n for m, n in zip(pipe.unet.modules(), pipe.loaded.loras.base["unet"].modules()))


def test_prompts_of_different_length_with_different_adapters(files):
    """Each row's prompt keeps its own number of tokens, whatever shares the batch."""
    pipe = loaded(files)
    long = "a (red:1.3) circle above a blue square, " * 12
    prompts, each = [make.PROMPT, long, "a ((green)) ring", long], ["b", None, "b", {"a": 0.5}]
    batch = ours(pipe, [1, 2, 3, 4], prompt=prompts, loras=each, prompt_weighting=True)
    for i, (prompt, one) in enumerate(zip(prompts, each)):
        alone = ours(pipe, [i + 1], prompt=prompt, loras=one or {}, prompt_weighting=True)
        assert torch.equal(batch[i:i + 1], alone), i
    cut = ours(pipe, [2], prompt="a (red:1.3) circle above a blue square, " * 4, loras={}, prompt_weighting=True)
    assert not torch.equal(batch[1:2], cut), "what lies beyond 77 tokens must be seen"


def test_swaps_in_other_threads(files):
    """A call that runs while adapters are swapped, fused and unloaded is all old or all new."""
    pipe = loaded(files)
    known = [ours(pipe, loras=one) for one in ({}, "a", "b", {"a": 0.5})]
    found, errors, stop = [], [], threading.Event()

    def draw():
        try:
            for _ in range(6):
                found.append(ours(pipe))
        except Exception as error:
            errors.append(error)

    def swap():
        while not stop.is_set():
            pipe.enable_lora()
            pipe.set_adapters("a")
            pipe.fuse_lora(lora_scale=0.5)
            pipe.unfuse_lora()
            pipe.set_adapters("b")
            pipe.disable_lora()

    threads = [threading.Thread(target=draw) for _ in range(4)]
    swapper = threading.Thread(target=swap)
    swapper.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    swapper.join()
    assert not errors and len(found) == 24
    where = [next((i for i, k in enumerate(known) if torch.equal(k, x)), None) for x in found]
    fused = [float((x - known[3]).abs().max()) for i, x in zip(where, found) if i is None]
    print(f"24 pictures while adapters were swapped: {sorted(w for w in where if w is not None)}, {len(fused)} fused")
    assert all(d <= 1e-4 for d in fused)


_CYCLES = """
import sys
from pathlib import Path
import torch
import ldmfast

folder, count = Path(sys.argv[1]), int(sys.argv[2])
pipe = ldmfast.Pipeline.tiny(precision="int8")

def draw():
    return pipe("a red circle", num_inference_steps=3, output_type="latent", generator=7, progress=False).images

def cycle(i):
    name, other = ("a", "b")[:: 1 if i % 2 else -1]
    pipe.load_lora_weights(folder / f"{name}.safetensors", name)
    pipe.set_adapters(name, i / count)
    pipe.load_lora_weights(folder / f"{other}.safetensors", other)
    pipe.set_adapters([name, other], [0.5, 1 + i / count])
    if i % 100 == 0:
        pipe.fuse_lora()
        assert not torch.equal(draw(), before)
        pipe.unfuse_lora()
    pipe.delete_adapters(name)
    pipe.unload_lora_weights()

before = draw()
for i in range(500):  # in the first hundreds half a MiB comes once; 1,500 more add nothing
    cycle(i)
start = resident.now()
for i in range(count):
    cycle(i)
grown = resident.now() - start
assert torch.equal(draw(), before)
print(grown)
"""


@resident.NEEDED
def test_cycles_leave_nothing_behind(files, tmp_path):
    """Two adapters are loaded, swapped and unloaded in each cycle, in 8 bits; now and then drawn with, and fused."""
    for name, (lora, _) in files.items():
        small = {n: m for n, m in lora.items() if n.endswith(("to_q", "to_v", "fc1"))}
        save_file(make.kohya(small), tmp_path / f"{name}.safetensors")
    grown = int(resident.fresh(_CYCLES, tmp_path, CYCLES)) / resident.MIB
    print(f"{CYCLES} cycles of load, swap and unload: {grown:+.2f} MiB")
    assert grown <= 1.0


def test_settings_name_the_adapters(files, tmp_path):
    """A saved picture can be repeated where its adapters are, whatever is active, and says so where they are not."""
    pipe = loaded(files)
    pipe.set_adapters(["a", "b"], [{"unet": {"up": {"block_1": [0.5, 2.0]}}}, -0.5])
    out = pipe(**CALL | {"output_type": "pil", "progress": False, "generator": 3, "prompt": [make.PROMPT] * 2},
               loras=[{"a": {"unet": {"mid": 0.1}}}, {"a": 0.5, "b": 2}])
    [_, second] = out.save(tmp_path / "picture.png")
    settings = ldmfast.pipelines.read_settings(second)
    assert settings["loras"]["b"]["weight"] == {"unet": 2.0, "text_encoder": 2.0}
    pipe.set_adapters("b")
    again = pipe.repeat(settings, progress=False)
    assert list(again.images[0].getdata()) == list(out.images[1].getdata())
    first = pipe.repeat(out.settings[0], progress=False)
    assert list(first.images[0].getdata()) == list(out.images[0].getdata())
    pipe.delete_adapters("a")
    with pytest.raises(LdmfastError, match=r"adapter 'a'.*not loaded"):
        pipe.repeat(settings, progress=False)
    pipe.fuse_lora()
    with pytest.raises(LdmfastError, match="fused into the weights: none"):
        pipe.repeat(settings, progress=False)


def test_two_adapters_are_summed_in_one_order(files, tmp_path):
    """However the choice was written: JSON sorts the names of what a picture was made with."""
    pipe = loaded(files)
    assert torch.equal(ours(pipe, loras={"b": 0.7, "a": 0.9}), ours(pipe, loras={"a": 0.9, "b": 0.7}))


def test_a_lora_that_turns_numbers_to_nan_is_named(files):
    """Fused or beside the weights, the finder looks into the network that ran."""
    lora = {n: make.Matrices(m.down * 1e30, m.up * 1e30, m.alpha) for n, m in files["a"][0].items()
            if n.endswith("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")}
    pipe = ldmfast.Pipeline.tiny()
    pipe.load_lora_weights(make.kohya(lora))
    with pytest.raises(ldmfast.PrecisionError, match=r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1"):
        ours(pipe)


def test_lcm(theirs):
    """LCM-LoRA is a LoRA of the UNet (kohya's layout, convolutions too) with the solver lcm and no guidance."""
    import diffusers

    lora = make.draw(theirs, 4, strength=0.02, components=["unet"])
    pipe = ldmfast.Pipeline.tiny()
    pipe.load_lora_weights(make.kohya(lora), "lcm")
    got = ours(pipe, solver="lcm", guidance_scale=1.0, num_inference_steps=4)
    summed = make.merged(theirs, (lora, 1.0))
    summed.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config, original_inference_steps=50)
    assert torch.isfinite(got).all() and (got - ours(pipe, solver="lcm", guidance_scale=1.0, num_inference_steps=4,
                                                     loras={})).abs().max() > 0.01
    # the network itself, at LCM's first timestep, is diffusers' with the dense sum
    x, prompt = torch.randn(1, 8, 8, 8), torch.randn(1, 32, 128)
    with torch.no_grad():
        wanted = summed.unet(x, 999, prompt).sample
    assert (pipe.unet(x, 999, prompt) - wanted).abs().max() <= 1e-4


def test_diffusers_with_peft(theirs, files, tmp_path):
    """diffusers' own loading of the same files, with peft. One rank and alpha: where alphas differ, diffusers 0.42
    names them in peft's alpha_pattern in a way that peft 0.21 does not match, and ignores with a warning."""
    pytest.importorskip("peft", reason="peft is not installed")
    files = {name: ({n: make.Matrices(m.down[:4], m.up[:, :4], 2.0) for n, m in lora.items()},
                    tmp_path / f"{name}.safetensors") for name, (lora, _) in files.items()}
    for matrices, file in files.values():
        save_file({k: v.contiguous() for k, v in make.kohya(matrices).items()}, file)
    pipe, other = loaded(files), make.diffusers_pipeline()
    for name, (_, file) in files.items():
        other.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        assert other.get_active_adapters() == ldmfast_names(pipe, name)
    weights = [{"unet": {"down": 0.5, "up": {"block_1": [0.2, 1.5]}}, "text_encoder": 0.3}, 0.8]
    for each in (pipe, other):
        each.set_adapters(["a", "b"], weights)
    wanted = other(**CALL, generator=torch.Generator().manual_seed(7)).images
    assert (wanted - expected(theirs)).abs().max() > 0.05
    assert (ours(pipe) - wanted).abs().max() <= 1e-4
    ldmfast.accelerate(other)
    assert "LoRA" in other.ldmfast_report.left_alone["unet"]
    again = other(**CALL, generator=torch.Generator().manual_seed(7)).images
    assert torch.equal(again, wanted)


def ldmfast_names(pipe, name):
    pipe.set_adapters(name)
    return pipe.get_active_adapters()
