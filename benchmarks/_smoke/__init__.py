"""The stages of benchmarks/gpu_smoke.py."""
