"""TIR kernels for AArch64: plain NEON, dot products, i8mm."""
