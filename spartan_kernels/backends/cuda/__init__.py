"""The extension's CUDA kernels: tensors to pointers, shapes and the current stream."""
