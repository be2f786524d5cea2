"""The benchmark harness. `python -m idefics2_fast.benchmarks --help`."""
