"""Text to latents to pixels: the wiring of text encoders, denoiser, solver and autoencoder."""

from .output import PipelineOutput, read_settings, save_png
from .pipeline import Pipeline

__all__ = ["Pipeline", "PipelineOutput", "read_settings", "save_png"]
