"""The extension's CPU kernels: tensors to pointers, sizes and strides."""
