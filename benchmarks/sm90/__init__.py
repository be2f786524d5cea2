"""Hopper code on a CPU: what Triton compiles for sm_90a, executed, counted and read."""
