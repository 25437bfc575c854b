"""Benchmarks of the library against what it replaces: `textcraftor bench`."""

from textcraftor.bench.training import bench_training

__all__ = ["bench_training"]
