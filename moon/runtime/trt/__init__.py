"""TensorRT and TensorRT-RTX: the packages, and the engines a bundle holds for them."""
