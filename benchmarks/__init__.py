"""Side-by-side measurements: `python -m benchmarks.<name>`. Rows with provenance go to benchmarks/results."""
