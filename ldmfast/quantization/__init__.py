"""Which layers of a network run in 8 bits."""

from .plan import default_plan

__all__ = ["default_plan"]
