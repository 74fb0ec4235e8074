"""`batchmix benchmark` and `batchmix tune`: what the kernels reach on the GPU at hand."""
