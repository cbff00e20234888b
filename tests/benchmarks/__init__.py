"""Benchmarks: each module has ``run() -> list[dict]``; ``python -m tests.benchmarks`` runs them."""
