"""A trained classifier as one file that needs no bmjax: StableHLO for jax alone, ONNX for ONNX Runtime."""
