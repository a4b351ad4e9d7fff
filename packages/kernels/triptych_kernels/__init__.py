"""Fused training ops for PyTorch, each beside its plain reference: attention on packed sequences, linear cross entropy, RMSNorm, SwiGLU."""
