"""TIR kernels for NVIDIA GPUs, in int8 and float16."""
