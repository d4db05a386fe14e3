"""Benchmarks of the operations against their peers: `python -m benchmarks`, or pytest-benchmark on bench_*.py."""
