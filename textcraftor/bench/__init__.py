"""Benchmarks of the library against what it replaces: `textcraftor bench`."""
