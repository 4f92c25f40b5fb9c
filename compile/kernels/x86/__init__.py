"""TIR kernels for x86-64: AVX2 and AVX512-VNNI."""
