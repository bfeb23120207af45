"""HEST-Bench (Jaume et al. 2024, NeurIPS) on a folder in its published layout.

The published protocol stands in columns of its own; what HiBio adds stands beside it, never in it.
"""

from eval.hest_bench.run import HestBenchConfig, hest_bench

__all__ = ["HestBenchConfig", "hest_bench"]
