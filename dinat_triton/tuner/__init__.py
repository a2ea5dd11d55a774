"""The search for the fastest configs of the kernels, and tiles of the `tiled` backend."""
