"""Triton kernels, one op a file; installed as ldmfast.kernels."""
