"""Our own kernels, written in Triton and registered as torch operators."""
