"""GPUs that are not here: their figures, what the kernels become on them, and how long that would take."""
