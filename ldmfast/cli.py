"""The ``ldmfast`` command: generate pictures, inspect checkpoints, tell what is live on this machine."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_tuning
from .errors import LdmfastError

if TYPE_CHECKING:
    from .pipelines import Pipeline

app = typer.Typer(
    help="Run latent diffusion at the speed the hardware allows. Nothing is ever downloaded.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)

EXAMPLES = """Examples:

  ldmfast generate "a red circle above a blue square" --seed 0 --out demo.png

  ldmfast generate "a castle" --model path/to/sd15 --steps 25 --precision bf16 --num 4

  ldmfast generate "a castle" --model path/to/model.safetensors --image sketch.png --strength 0.6

  ldmfast generate --from-png demo.png --out again.png
"""


QUANTIZE_EXAMPLES = """Examples:

  ldmfast quantize path/to/sd15 --report

  ldmfast generate "a castle" --model path/to/sd15 --precision int8
"""


CONVERT_EXAMPLES = """Examples:

  ldmfast convert path/to/sd15 sd15.safetensors --dtype float16

  ldmfast convert model.ckpt path/to/new-folder

  ldmfast convert unet-Q8_0.gguf unet.safetensors --dtype bfloat16
"""


TUNE_STEPS_EXAMPLES = """Examples:

  ldmfast tune-steps --steps 6 --solver dpmpp_2m --out grid.json

  ldmfast generate "a red circle" --grid grid.json
"""


def _fail(error: Exception) -> None:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    typer.echo(f"ldmfast: {text}", err=True)
    raise typer.Exit(2)


def _open(model: str, precision: str, device: str) -> Pipeline:
    from .pipelines import Pipeline
    from .pipelines.pipeline import TINY

    for network, name in TINY.items():
        if model == name:
            return Pipeline.tiny(network, precision=precision, device=device)
    if Path(model).is_file():
        return Pipeline.from_single_file(model, precision=precision, device=device)
    return Pipeline.from_pretrained(model, precision=precision, device=device)


def _picture(path: Path | None) -> Any:
    if path is None:
        return None
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL says of broken files
        raise LdmfastError(f"{path}: not a readable picture ({error})") from error


def _live_kernels(device: str) -> str:
    from . import ops

    rows = {name: row.live(device) for name, row in sorted(ops.ROWS.items())}
    return ", ".join(f"{name} ({backend})" for name, backend in rows.items())


@app.command(epilog=EXAMPLES)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    model: Annotated[str | None, typer.Option(help="A diffusers folder, a single .safetensors file, or a "
                                                   "shipped model: 'tiny' (default), 'tiny-dit', 'tiny-lcm'.")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write; with --num above 1, name-0.png, name-1.png, ...")
                   ] = Path("out.png"),
    seed: Annotated[int | None, typer.Option(help="Picture i uses seed + i. Default: a fresh one, printed.")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    num: Annotated[int | None, typer.Option(help="How many pictures (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps (default: the model's own, otherwise 50).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 turns it off.")] = None,
    solver: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, unipc, ... (a wrong name lists all).")
                      ] = None,
    grid: Annotated[Path | None, typer.Option(help="Learned steps, as `ldmfast tune-steps` writes them; in place of "
                                                   "--steps and --solver.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this picture (image to image).")] = None,
    mask: Annotated[Path | None, typer.Option(help="With --image: repaint only where this picture is white.")] = None,
    strength: Annotated[float | None, typer.Option(help="0 to 1: how much of --image is redrawn.")] = None,
    precision: Annotated[str | None, typer.Option(help="exact (fp32, default), bf16, int8, fp8, or auto.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    settings: Annotated[str | None, typer.Option(help="A settings file of 'ldmfast tune', or 'auto' for the one beside "
                                                      "the model; sets precision, solver, steps and cache.")] = None,
    from_png: Annotated[Path | None, typer.Option(help="Repeat the picture in this PNG, bit for bit; only --model, "
                                                       "--out, --image, --mask, --device and --quiet may be given "
                                                       "beside it.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Draw a picture from a text (and, if you like, from another picture)."""
    begin = time.perf_counter()
    try:
        _check_out(out)
        if from_png is not None:
            given = {"prompt": prompt, "seed": seed, "negative": negative, "steps": steps, "guidance": guidance,
                     "solver": solver, "grid": grid, "height": height, "width": width, "strength": strength,
                     "precision": precision, "settings": settings, "num": num}
            extra = [name for name, value in given.items() if value is not None]
            if extra:
                raise LdmfastError(f"--from-png repeats a picture exactly, so {extra[0]!r} cannot be given beside it")
            pipe, result, loaded = _repeat(from_png, model, device, image, mask, quiet)
        else:
            if prompt is None:
                raise LdmfastError("no prompt was given: ldmfast generate \"a red circle above a blue square\"")
            tuned: Any = settings
            if settings is not None:
                from .tuning import Settings

                if precision is not None:
                    raise LdmfastError("--settings sets what --precision would: leave one of them out")
                tuned = settings if settings == "auto" else Settings.load(settings)
            pipe = _open(model or "tiny", precision or str(getattr(tuned, "precision", "exact")), device)
            loaded = time.perf_counter()
            given = {"image": _picture(image), "mask_image": _picture(mask), "strength": strength}
            sources: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            sources |= {} if grid is None else {"grid": grid}
            if sources.keys() - {"grid"} and not pipe.takes_pictures:
                raise LdmfastError("this model draws from a text alone: leave out --image, --mask and --strength")
            result = pipe(prompt, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
                          negative_prompt=negative, num_images_per_prompt=1 if num is None else num, generator=seed,
                          solver=solver, progress=not quiet, settings=tuned, **sources)
        done = time.perf_counter()
        files = result.save(out)
    except (LdmfastError, OSError) as error:
        _fail(error)
        return
    for file, made in zip(files, result.settings):
        typer.echo(f"{file.resolve()}  {made['width']}x{made['height']}  seed {made['seed']}")
    made = result.settings[0]
    typer.echo(f"{done - loaded:.2f} s for {len(files)} picture{'s' * (len(files) > 1)} "
               f"({made['num_inference_steps']} steps, {made['solver']}, guidance "
               f"{made['guidance_scale']:g}, {made['precision']}), {loaded - begin:.2f} s to load")
    if result.report is not None and result.report.promise is not None:
        typer.echo(f"promised: {result.report.promise}")
    typer.echo(f"kernels: {_live_kernels(pipe.device.type)}")


def _check_out(out: Path) -> None:
    """Before heavy work: the folder is there and the name is a PNG's."""
    if out.suffix.lower() != ".png":
        raise LdmfastError(f"--out {out} does not end in .png: the settings are kept in PNG metadata")
    _check_folder(out)
    if out.is_dir():
        raise LdmfastError(f"--out {out} is a folder: give the name of a PNG in it")


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise LdmfastError(f"folder {out.parent} does not exist: create it or choose another --out")
    if not os.access(out.parent, os.W_OK):
        raise LdmfastError(f"folder {out.parent} cannot be written to: choose another --out")


def _repeat(png: Path, model: str | None, device: str, image: Path | None, mask: Path | None, quiet: bool) -> Any:
    from .pipelines import read_settings

    settings = read_settings(png)
    pipe = _open(model or str(settings.get("model")), str(settings.get("precision")), device)
    loaded = time.perf_counter()
    result = pipe.repeat(settings, image=_picture(image), mask_image=_picture(mask), progress=not quiet)
    return pipe, result, loaded


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A diffusers folder or a single weights file.")],
) -> None:
    """Tell what a checkpoint is: its parts, sizes and dtypes, from its headers alone; nothing is loaded."""
    from .checkpoints import inspect as report

    try:
        typer.echo(str(report(path)))
    except (LdmfastError, OSError) as error:
        _fail(error)


@app.command(epilog=QUANTIZE_EXAMPLES)
def quantize(
    model: Annotated[str, typer.Argument(help="A diffusers folder or a single .safetensors file.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line, to calibrate on (default: six "
                                                      "prompts of its own).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Solver steps of each calibration picture.")] = 12,
    least: Annotated[float | None, typer.Option(help="Layers below this SQNR, in dB, stay in bf16.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weight files named model.<variant>.safetensors.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Print the SQNR of every layer, the worst first.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Calibrate a checkpoint for --precision int8 and store the plan and the int8 weights beside it.

    Draws a few pictures in bf16 and measures, layer by layer and for three ranges of timesteps, how far above the
    rounding noise of 8 bits the signal is. int8 works without this, too; a calibrated checkpoint loads faster and
    keeps the layers in bf16 that need it.
    """
    from .quantization.calibrate import LEAST, PROMPTS
    from .quantization.calibrate import quantize as calibrate

    try:
        texts = PROMPTS if prompts is None else _lines(prompts)
        found = calibrate(model, prompts=texts, steps=steps, least=LEAST if least is None else least, variant=variant,
                          progress=not quiet)
    except (LdmfastError, OSError) as error:
        _fail(error)
        return
    if report:
        typer.echo(found.table())
    typer.echo(str(found))
    typer.echo(f"written to {found.file} ({found.file.stat().st_size / 1e6:.1f} MB)")


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LdmfastError(f"{file}: not a readable text file ({error})") from error


@app.command(epilog=CONVERT_EXAMPLES)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A diffusers folder, or a .safetensors, .ckpt or .gguf "
                                                               "file.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A name ending in .safetensors, or a folder; it must "
                                                               "not exist yet.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float8_e4m3fn or float8_e5m2 (default: "
                                                   "as stored; float32 for quantised tensors).")] = None,
    variant: Annotated[str | None, typer.Option(help="Weight files of the folder named model.<variant>.safetensors.")
                       ] = None,
    prediction_type: Annotated[str | None, typer.Option(help="epsilon or v_prediction, where a file does not say.")
                               ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Write a checkpoint in another layout, format or dtype, one tensor at a time.

    A folder becomes a single file in the layout of ComfyUI and A1111, a file becomes a diffusers folder; between files
    names stay as they are. DST gets its name only when it is whole, whatever interrupts the writing.
    """
    from .checkpoints.convert import convert as run

    try:
        left_out = run(source, target, dtype=dtype, variant=variant, prediction_type=prediction_type,
                       progress=not quiet)
    except (LdmfastError, OSError) as error:
        _fail(error)
        return
    files = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
    typer.echo(f"written to {target} ({sum(f.stat().st_size for f in files) / 1e6:.1f} MB)")
    if left_out:
        typer.echo(f"left out, because a single file has no place for it: {', '.join(left_out)}")


@app.command("tune-steps", epilog=TUNE_STEPS_EXAMPLES)
def tune_steps(
    model: Annotated[str, typer.Argument(help="A diffusers folder, a single .safetensors file, 'tiny' or 'tiny-dit'.")
                     ] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Solver steps of a picture.")] = 6,
    solver: Annotated[str | None, typer.Option(help="Default: dpmpp_2m, of a flow schedule flow_euler.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("grid.json"),
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line, to learn from.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to learn from, of the prompts in turn.")] = 32,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (default: the model's own).")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="At most.")] = 8,
    precision: Annotated[str, typer.Option(help="exact (fp32), bf16, int8, fp8, or auto.")] = "exact",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not tell of iterations.")] = False,
) -> None:
    """Learn where a few steps lie best: noise levels and network times, nearest to a fine solve of the same seeds."""
    def tell(iteration: int, error: float) -> None:
        typer.echo(f"iteration {iteration}: latent error {error:.4f}", err=True)

    try:
        _check_folder(out)
        pipe = _open(model, precision, device)
        grid = pipe.learn_grid(None if prompts is None else _lines(prompts), steps, solver, pictures=pictures,
                               iterations=iterations, progress=None if quiet else tell,
                               **({} if guidance is None else {"guidance_scale": guidance}))
        grid.save(out)
    except (LdmfastError, OSError) as error:
        _fail(error)
        return
    typer.echo(f"{out}: {grid.evaluations} evaluations of {grid.solver}, latent error {grid.error:.4f} "
               f"(its usual steps: {grid.default_error:.4f})")


app.command(epilog=cli_tuning.CERTIFY_EXAMPLES)(cli_tuning.certify)
app.command(epilog=cli_tuning.TUNE_EXAMPLES)(cli_tuning.tune)


@app.command()
def info() -> None:
    """Tell the version, the CPU's instruction sets, CUDA, and which kernel of every op is live here."""
    from ._info import info as facts

    typer.echo(str(facts()))


def main() -> None:
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # while what comes of it can be told
    except LdmfastError as error:  # LDMFAST_CPU_ISA, which is read when a command imports the kernels
        typer.echo(f"ldmfast: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # of a full disk, where a shell has sent our output; commands tell of their own files
        with suppress(OSError):
            typer.echo(f"ldmfast: the output cannot be written ({error.strerror or error})", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be tried again at exit
        sys.exit(1)


if __name__ == "__main__":
    main()
