"""The module paths of `segment_anything.utils`: amg, transforms and onnx."""
