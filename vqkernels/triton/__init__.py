"""The operations as Triton kernels: one file per operation, imported when one is first used.

A function here has the name, arguments and results of the operation of `torch.ops.vqkernels` that it implements. It
serves CUDA tensors where the native library has no CUDA kernels, and CPU tensors in Triton's interpreter.
"""
