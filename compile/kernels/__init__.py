"""TIR kernels of the int8 operators, one file per processor family, over one shared form of a kernel call."""
