"""The commands ``ldmfast certify`` and ``ldmfast tune``."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import LdmfastError

if TYPE_CHECKING:
    from .caches import Policy

CERTIFY_EXAMPLES = """Examples:

  ldmfast certify --cache "TaylorSeer(interval=3, on='output')" --out certificate

  ldmfast certify path/to/sd15 --prompts prompts.txt --precision int8 --solver dpmpp_2m --steps 15 --out certificate

  ldmfast certify path/to/sd15 --prompts others.txt --settings settings.json --out certificate
"""

TUNE_EXAMPLES = """Examples:

  ldmfast tune --min-psnr 30 --budget 60 --out settings.json

  ldmfast generate "a red circle" --settings settings.json

  ldmfast tune path/to/sd15 --prompts prompts.txt --max-latent-error 0.1 --budget 3600

  ldmfast generate "a castle" --model path/to/sd15 --settings auto
"""

Model = Annotated[str, typer.Argument(help="A diffusers folder, a single .safetensors file, or a shipped model: "
                                           "'tiny', 'tiny-dit', 'tiny-lcm'.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file, one prompt a line. Shipped models have captions of "
                                                   "their own.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures a call; time depends on it.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def certify(
    model: Model = "tiny",
    prompts: Prompts = None,
    settings: Annotated[str | None, typer.Option(help="A settings file of 'ldmfast tune', or 'auto' for the one beside "
                                                      "the model; in place of the next four.")] = None,
    precision: Annotated[str, typer.Option(help="exact, bf16, int8 or fp8.")] = "exact",
    solver: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: the model's own.")] = None,
    cache: Annotated[str | None, typer.Option(help="A policy of docs/caches.md as it is written in Python, or several "
                                                   "joined by +.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next ones follow.")] = 0,
    batch: Batch = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for certificate.json, .html and .png.")] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure what faster settings change: every prompt is drawn twice from the same noise, exactly and fast.

    Prints PSNR, SSIM and the error of the latents (mean, worst, a 95% bound of the mean), time by part, evaluations of
    the network and memory. The last line of the table of times is what was saved.
    """
    from .cli import _fail, _open

    try:
        from .tuning import Settings

        given = {"--precision": precision != "exact", "--solver": solver, "--steps": steps, "--cache": cache}
        beside = [name for name, value in given.items() if settings is not None and value]
        if beside:
            raise LdmfastError(f"--settings sets what {beside[0]} would: leave one of them out")
        if settings is None:
            fast: Any = Settings(precision=precision, solver=solver, steps=steps, cache=policies(cache))
        else:
            fast = settings if settings == "auto" else Settings.load(settings)
        texts = _prompts(model, prompts, 20)
        pipe = _open(model, "exact", device)
        report = pipe.certify(texts, fast, seeds=seed, batch=batch, progress=not quiet)
        typer.echo(str(report))
        for file in report.save(out) if out is not None else ():
            typer.echo(f"written to {file}")
    except (LdmfastError, OSError) as error:
        _fail(error)


def tune(
    model: Model = "tiny",
    prompts: Prompts = None,
    min_psnr: Annotated[float | None, typer.Option(help="Promise: mean PSNR from the exact pictures, in dB (default "
                                                        "30).")] = None,
    max_latent_error: Annotated[float | None, typer.Option(help="Promise instead: mean relative error of the last "
                                                                "latents.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds that the search may take.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of the split of the prompts and of the pictures.")] = 0,
    batch: Batch = 1,
    out: Annotated[Path | None, typer.Option(help="A name ending in .json; a plot of the same name goes beside it. "
                                                  "Default: beside the model, where --settings auto finds it.")] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Find the fastest settings that keep a promise: precision, solver, steps and caches, searched on a third of the
    prompts and tested on the others.

    The promise holds for the mean of 100 unseen prompts like these with 95% confidence. Needs 24 prompts, better 60.
    """
    from .cli import _fail, _open

    try:
        texts = _prompts(model, prompts, 60)
        pipe = _open(model, "exact", device)
        if min_psnr is None and max_latent_error is None:
            min_psnr = 30.0
        found = pipe.tune(texts, min_psnr=min_psnr, max_latent_error=max_latent_error, budget_s=budget, seed=seed,
                          path=out, batch=batch, progress=not quiet)
        for line in str(found).split("; "):
            typer.echo(line)
        if pipe.tuned["file"] is not None:
            typer.echo(f"written to {pipe.tuned['file']}")
    except (LdmfastError, OSError) as error:
        _fail(error)


def policies(text: str | None) -> tuple[Policy, ...]:
    """"TaylorSeer(interval=3) + TGate()" as policies; names, literals and nothing else. Raises LdmfastError."""
    from .caches import POLICIES

    def one(node: ast.expr) -> Policy:
        if (not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args
                or node.func.id not in POLICIES or any(k.arg is None for k in node.keywords)):
            raise ValueError(f"not a policy with named arguments; there are {', '.join(POLICIES)}")
        values: dict[str, Any] = {
            str(k.arg): one(k.value) if isinstance(k.value, ast.Call) else ast.literal_eval(k.value)
            for k in node.keywords}
        return POLICIES[node.func.id](**values)

    def several(node: ast.expr) -> list[Policy]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return several(node.left) + several(node.right)
        return [one(node)]

    try:
        return () if text is None else tuple(several(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, TypeError) as error:
        raise LdmfastError(f"--cache {text}: {error}") from error


def _prompts(model: str, file: Path | None, count: int) -> list[str]:
    """Of the file, or captions that the shipped models were not trained on."""
    from .cli import _lines
    from .pipelines.pipeline import TINY

    if file is not None:
        return _lines(file)
    if model not in TINY.values():
        raise LdmfastError("--prompts is missing: a text file with one prompt a line, like those you will use")
    from .testing.scenes import sample_scenes

    return [scene.caption for scene in sample_scenes(count, 5, "heldout")]
