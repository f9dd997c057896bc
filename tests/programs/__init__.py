"""Small programs as other projects would write them: one function of genjax each, nothing else of
it. Each `main(num_steps)` prints what it reached and returns it; `python FILE` runs it alone."""
