"""Plans computed on tensors: in torch, compiled for the CPU, in Triton for CUDA, and by linear algebra."""
