"""Every error that ldmfast raises on purpose: one line that names the value, the limit and the way out."""

from __future__ import annotations


class LdmfastError(Exception):
    """Base of all errors raised by ldmfast. Bad argument values raise it directly."""


class CheckpointError(LdmfastError):
    """A checkpoint is missing, damaged, of an unknown kind, or has a setting that is not supported."""


class ShapeError(LdmfastError):
    """A tensor or picture size does not fit."""


class DeviceError(LdmfastError):
    """The device asked for is not there, or a tensor is on another one."""


class PrecisionError(LdmfastError):
    """A precision is not available here, or numbers became NaN or infinite."""
