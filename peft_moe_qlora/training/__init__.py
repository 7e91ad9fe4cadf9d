"""What a training needs beside the layers: a prepared model, and a look at its gradients."""

from .gradient_watch import watch_gradients
from .prepare import prepare_model_for_training, quantize_experts

__all__ = ["prepare_model_for_training", "quantize_experts", "watch_gradients"]
