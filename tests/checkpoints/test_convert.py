"""ldmfast convert: every layout to every other and back, what diffusers makes of the result, memory, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import diffusers
import numpy as np
import pytest
import resident
import safetensors.torch
import torch
import transformers
from test_single_file import MADE, Made

from ldmfast.checkpoints import open_folder, open_single_file
from ldmfast.checkpoints.convert import convert
from ldmfast.checkpoints.write import in_place
from ldmfast.errors import CheckpointError

TOKENIZER = Path(__file__).resolve().parents[2] / "ldmfast" / "assets" / "clip_tokenizer"
# tensors of a file that no part needs: a folder does not hold them, and they do not come back
EXTRA = ("alphas_cumprod", "model_ema.", "global_step")
# CLIP's constant positions and open_clip's temperature; SD 2's last layer and projection, which it does not use
UNUSED = ("position_ids", "logit_scale")


def _load(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest) -> Made:
    return MADE[request.param]()


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


def test_file_to_folder_to_file(made: Made, tmp_path: Path) -> None:
    """Bit for bit the tensors of the models that the file was made from, as the folder's and as the file's."""
    path = made.write(tmp_path)
    first = open_single_file(path)
    convert(path, tmp_path / "folder", progress=False)
    folder = open_folder(tmp_path / "folder")
    assert set(folder.names) == set(first.names)
    for part in ("unet", "vae"):
        assert _same(folder.weights(part), dict(made.parts[part].state_dict())), part
        assert folder.config(part) == first.config(part)
    for part in ("text_encoder", "text_encoder_2"):
        if part in made.parts:
            own = {k.removeprefix("text_model."): v for k, v in made.parts[part].state_dict().items()}
            found = {k.removeprefix("text_model."): v for k, v in folder.weights(part).items()}
            assert _same(found, own), part
    if made.parts["unet"].config.num_class_embeds is None:
        convert(tmp_path / "folder", tmp_path / "back.safetensors", progress=False)
        again, whole = _load(tmp_path / "back.safetensors"), dict(made.tensors)
        dropped = {k for k in whole if k.startswith(EXTRA) or k.endswith(UNUSED)}
        if any(k.startswith("cond_stage_model.model.") for k in whole):
            dropped |= {k for k in whole if ".resblocks.23." in k or k.endswith("text_projection")}
        again.pop("v_pred", None)
        assert _same(again, {k: v for k, v in whole.items() if k not in dropped})
        second = open_single_file(tmp_path / "back.safetensors")
        for part in first.names:
            assert second.config(part) == first.config(part), part


@pytest.mark.parametrize("kind", ["sd1", "sd1_inpainting", "sd2", "sdxl", "sdxl_refiner"])
def test_diffusers_opens_the_folder(kind: str, tmp_path: Path) -> None:
    """The pipeline class that the model belongs to, with the very networks; diffusers' loader is the judge."""
    made = MADE[kind]()
    convert(made.write(tmp_path), tmp_path / "folder", progress=False)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    expected = {"sd1": "StableDiffusionPipeline", "sd1_inpainting": "StableDiffusionInpaintPipeline",
                "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
                "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline"}
    assert type(pipe).__name__ == expected[kind]
    for part, model in made.parts.items():
        theirs = getattr(pipe, part).state_dict()
        own = model.state_dict()
        assert theirs.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in theirs.items()), part
    tokenizer = pipe.tokenizer or pipe.tokenizer_2
    reference = transformers.CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    assert tokenizer("a red cat, oil").input_ids == reference("a red cat, oil").input_ids
    assert tokenizer.model_max_length == 77


def _pipeline(folder: Path, **scheduler: object) -> diffusers.DiffusionPipeline:
    made = MADE["sd1"]()
    unet, vae = made.parts["unet"], made.parts["vae"]
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **scheduler}
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=made.parts["text_encoder"],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True),
        scheduler=diffusers.DDIMScheduler(**settings), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return pipe


def test_a_diffusers_folder_to_a_file_that_diffusers_reads(tmp_path: Path) -> None:
    """diffusers' own converters, given the file, return the pipeline's tensors."""
    from diffusers.loaders import single_file_utils as oracle

    pipe = _pipeline(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "x.safetensors", progress=False)
    tensors = _load(tmp_path / "x.safetensors")
    for found, own in ((oracle.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config)), pipe.unet),
                       (oracle.convert_ldm_vae_checkpoint(dict(tensors), dict(pipe.vae.config)), pipe.vae)):
        assert _same(found, dict(own.state_dict()))
    assert open_single_file(tmp_path / "x.safetensors").config("scheduler")["prediction_type"] == "epsilon"


def test_prediction_and_zero_terminal_survive(tmp_path: Path) -> None:
    _pipeline(tmp_path / "folder", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    convert(tmp_path / "folder", tmp_path / "x.safetensors", progress=False)
    assert {"v_pred", "ztsnr"} <= _load(tmp_path / "x.safetensors").keys()
    scheduler = open_single_file(tmp_path / "x.safetensors").config("scheduler")
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    made = MADE["sd1"]()
    path = made.write(tmp_path)
    convert(path, tmp_path / "x.safetensors", dtype=dtype, progress=False)
    found, wanted = _load(tmp_path / "x.safetensors"), getattr(torch, dtype)
    assert found.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        kept = tensor.to(wanted) if tensor.is_floating_point() else tensor
        assert found[name].dtype == kept.dtype and torch.equal(found[name].float(), kept.float()), name


def test_folder_to_folder_keeps_everything_else(tmp_path: Path) -> None:
    _pipeline(tmp_path / "folder").save_pretrained(tmp_path / "folder", variant="fp16", max_shard_size="200KB")
    (tmp_path / "folder" / "ldmfast.json").write_text("{}")
    convert(tmp_path / "folder", tmp_path / "new", dtype="bfloat16", variant="fp16", progress=False)
    a, b = open_folder(tmp_path / "folder"), open_folder(tmp_path / "new")
    assert a.index == b.index and (tmp_path / "new" / "ldmfast.json").is_file()
    for part in ("unet", "vae", "text_encoder"):
        assert _same(b.weights(part), a.weights(part, torch.bfloat16)) and a.config(part) == b.config(part)
        assert len(b.part_files(part)) == 1
    assert b.config("scheduler") == a.config("scheduler")
    assert {f.name for f in (tmp_path / "folder" / "tokenizer").iterdir()} == {
        f.name for f in (tmp_path / "new" / "tokenizer").iterdir()}


@pytest.mark.parametrize("kind, part", [("sd2", "unet"), ("sd1_inpainting", "unet"), ("sdxl", "vae")])
def test_one_model(kind: str, part: str, tmp_path: Path) -> None:
    """A model's folder to its own file and back, through a .ckpt on the way."""
    model = MADE[kind]().parts[part]
    if part == "vae":
        model.register_to_config(scaling_factor=0.13025)  # SDXL's: not of the network, a VAE's own file lacks it
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", progress=False)
    torch.save({"state_dict": _load(tmp_path / "b.safetensors")}, tmp_path / "c.ckpt")
    convert(tmp_path / "c.ckpt", tmp_path / "d.safetensors", progress=False)
    assert _same(_load(tmp_path / "d.safetensors"), _load(tmp_path / "b.safetensors"))
    convert(tmp_path / "d.safetensors", tmp_path / "e", progress=False)
    theirs = type(model).from_pretrained(tmp_path / "e", local_files_only=True)
    assert _same(dict(theirs.state_dict()), dict(model.state_dict()))


def test_gguf_to_safetensors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd1")
    values = rng.standard_normal((64, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("input_blocks.1.1.proj.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("out.0.weight", np.ones(7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q5_1))
    for dtype, wanted in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        target = tmp_path / f"{dtype}.safetensors"
        convert(tmp_path / "x.gguf", target, dtype=dtype, progress=False)
        found = _load(target)
        assert torch.equal(found["input_blocks.1.1.proj.weight"], expected.to(wanted))
        assert found["out.0.weight"].dtype == (wanted if dtype else torch.float16)


def _config(folder: Path, part: str, name: str = "config.json", **change: object) -> None:
    file = folder / part / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("change, message", [
    (lambda f: _config(f, "unet", attention_head_dim=4), "has down block 0: heads = 4, .* is read with 8"),
    (lambda f: _config(f, "unet", norm_num_groups=16), "groups = 16, .* is read with 32"),
    (lambda f: _config(f, "unet", flip_sin_to_cos=False), "has flip_sin_to_cos = False, .* is read with True"),
    (lambda f: _config(f, "vae", scaling_factor=0.5), "part 'vae' has scaling_factor = 0.5"),
    (lambda f: _config(f, "text_encoder", num_attention_heads=2), "has num_attention_heads = 2, .* is read with 1"),
    (lambda f: _config(f, "scheduler", "scheduler_config.json", beta_end=0.02), "the scheduler has beta_end = 0.02"),
])
def test_what_a_single_file_cannot_say_is_refused(change, message: str, tmp_path: Path) -> None:
    """It holds no configs: whoever opens it would build another network, and draw a wrong picture."""
    _pipeline(tmp_path / "folder")
    change(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "folder", tmp_path / "x.safetensors", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_the_shipped_model_stays_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep it as a folder"):
        convert(TOKENIZER.parent / "tiny", tmp_path / "x.safetensors", progress=False)
    convert(TOKENIZER.parent / "tiny", tmp_path / "tiny", dtype="float32", progress=False)
    import ldmfast

    pictures = [ldmfast.Pipeline.from_pretrained(p)("a red circle", generator=0, num_inference_steps=2, progress=False,
                                                    output_type="np").images
                for p in (TOKENIZER.parent / "tiny", tmp_path / "tiny")]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("act, message", [
    (lambda t: convert(t / "a.safetensors", t / "b.ckpt"), "only .safetensors files and folders are written"),
    (lambda t: convert(t / "a.safetensors", t / "b.safetensors", dtype="float"), "dtype 'float' is not known"),
    (lambda t: convert(t / "a.safetensors", t / "a.safetensors"), "exists already"),
    (lambda t: convert(t / "a.safetensors", t), "exists already|holds no part"),
    (lambda t: convert(t / "none", t / "b"), "none: does not exist"),
    (lambda t: convert(t / "a.safetensors", t / "no" / "b.safetensors"), "folder .*no does not exist"),
    (lambda t: convert(t / "a.safetensors", t / "b"), "holds no part of SD 1"),
    (lambda t: convert(t / "a.safetensors", t / "b.safetensors", dtype="float16"),
     r"'big' has numbers up to 7e\+04, float16 ends at 6.55e\+04; use bfloat16"),
    (lambda t: convert(t / "a.safetensors", t / "b.safetensors", dtype="float8_e4m3fn"), "float8_e4m3fn ends at 448"),
])
def test_refusals_leave_nothing(act, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"small": torch.ones(3), "big": torch.tensor([7e4, torch.inf])}, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message) as caught:
        act(tmp_path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot be asked for a process without sending it a signal")
@pytest.mark.parametrize("name", ["b.safetensors", "b"])
def test_leftovers_of_dead_processes_go(name: str, tmp_path: Path) -> None:
    """A conversion that was killed left its temporary, as large as a model, for good."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    huge = 10**30  # no system has such a process
    for leftover in (f".{name}.{dead.pid}.part", f".{name}.{huge}.part"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / f".{name}.0{dead.pid}.part").write_bytes(b"half")
    stay = [f".{name}.{os.getppid()}.part", f".{name}.1.part", f".x{name}.{dead.pid}.part", f"{name}.{dead.pid}.part",
            f".{name}.{dead.pid}.part2", f".{name}.{dead.pid}x.part", f".{name}.x.{dead.pid}.part",
            f".{name.replace('.', '_')}_.{dead.pid}.part"]
    for other in stay:
        (tmp_path / other).write_bytes(b"not ours")
    (tmp_path / "from").mkdir()
    source = TOKENIZER.parent / "tiny" / "vae"
    if name.endswith(".safetensors"):
        source = tmp_path / "from" / "a.safetensors"
        safetensors.torch.save_file({"a": torch.ones(3)}, source)
    convert(source, tmp_path / name, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {name, "from", *stay}
    assert all((tmp_path / other).read_bytes() == b"not ours" for other in stay)


def test_a_writer_that_only_looks_dead_puts_nothing_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on another machine that shares the disk: its folder is taken away as a whole, so that its rename fails."""
    def write(pid: int) -> AbstractContextManager[Path]:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        return in_place(tmp_path / "c")

    with pytest.raises(CheckpointError, match="c: cannot be written"), write(10**9) as first:
        first.mkdir()
        (first / "a").write_bytes(b"whole")
        with pytest.raises(KeyboardInterrupt), write(10**9 + 1):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


_MEASURE = """
import sys
from ldmfast.checkpoints.convert import convert

convert(sys.argv[1] + ".small", sys.argv[2] + ".safetensors", dtype=sys.argv[3], progress=False)  # loads libraries
print(resident.peak(lambda: convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], progress=False)))
"""


@resident.NEEDED
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "gguf"])
def test_memory_is_a_tensor_not_the_model(ending: str, tmp_path: Path) -> None:
    """A file of 12 tensors of 16 MiB in fp32 (or Q8_0) to bf16: at most 1.1 times a tensor before and after,
    24 MiB, and 12 MiB of pieces in flight, where the model has 192. At least the tensor itself must be seen, or the
    meter is blind (a first version was: memory that a run of the same file had freed served the next)."""
    path = tmp_path / f"x.{ending}"
    for file, rows in ((path, 4096), (Path(f"{path}.small"), 8)):
        tensors = {str(i): torch.randn(rows, 1024) for i in range(12)}
        if ending == "gguf":
            gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")
            writer = gguf.GGUFWriter(file, "sd1")
            for name, tensor in tensors.items():
                writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0),
                                  raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        elif ending == "ckpt":
            torch.save(tensors, file)
        else:
            safetensors.torch.save_file(tensors, file)
    grown = int(resident.fresh(_MEASURE, path, tmp_path / "y.safetensors", "bfloat16"))
    print(f"{ending}: {grown / resident.MIB:.1f} MiB")
    assert 15 <= grown / resident.MIB <= 1.1 * (16 + 8) + 12, grown
