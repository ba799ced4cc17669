"""Fast paths of the helper layers in `blocks/kernels`, which stay the truth they are compared with.

Each file is one op: a torch custom op (shapes for tracing, gradients, FLOPs) with an implementation per device, settled
when the file is imported and told by its `status()`; its `cases()` are what it is timed at. Emitted modules import from
here what `blocks/kernels` lists under `FAST`; standalone sources hold the reference versions and never come here.
"""
