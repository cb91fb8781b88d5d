"""How the model is run for inference: precision, and the stages between an image and its masks."""

from sam_fast.runtime.inference import InferenceRuntime
from sam_fast.runtime.precision import resolve_precision

__all__ = ["InferenceRuntime", "resolve_precision"]
