"""TIR kernels for GPUs through OpenCL, in int8 and float16."""
