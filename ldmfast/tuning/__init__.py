"""What a speed-up does to the picture, measured; and settings that keep a promise about it.

``pipe.certify(prompts, settings)`` draws exact and fast pictures from the same noise and reports what differs and what
was saved. ``pipe.tune(prompts, min_psnr=30)`` searches the fastest settings that keep the promise on held-out pictures;
``pipe(prompt, settings="auto")`` uses them. docs/certify.md tells the method.
"""

from __future__ import annotations

from .bounds import mean_bound, one_bound, share_bound
from .certify import Judge, certify
from .metrics import psnr, ssim
from .report import Arm, Report
from .settings import Promise, Settings
from .tune import Front, Point, tune

__all__ = ["Arm", "Front", "Judge", "Point", "Promise", "Report", "Settings", "certify", "mean_bound", "one_bound",
           "psnr", "share_bound", "ssim", "tune"]
