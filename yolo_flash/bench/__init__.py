"""Benchmarks: stock against ours."""
