"""A kit to try our CUDA kernels on a borrowed NVIDIA GPU: what makes it here, and the script that runs it there."""
