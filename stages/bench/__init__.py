"""Benchmarks of the stages, behind `flexsink bench`; what they found is recorded in tests/bench/results."""
