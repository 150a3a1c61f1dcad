"""Attention-based transfer learning for bone-marrow cell images, in JAX."""
