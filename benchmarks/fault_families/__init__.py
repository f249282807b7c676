"""The faults that benchmarks/faults.py injects, a module for each kind."""
