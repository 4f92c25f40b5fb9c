"""TIR kernels of the operators, one folder per processor family, over one shared form of a kernel call."""
