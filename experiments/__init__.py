"""One file per model; each runs as `python -m experiments.NAME`."""
