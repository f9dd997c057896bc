"""Public functions that have no example in their docstring yet: only fewer."""

WITHOUT = [
    "diffusion.unmasking.unmask_step",
    "flows.bijections.couplings.masked_coupling",
    "flows.bijections.image.multi_scale",
    "training.parallel.initialize_distributed",
]
