"""What a training needs beside the layers: a prepared model, a look at its gradients and at its optimizer."""

from .gradient_watch import watch_gradients
from .optimizer_check import refuse_optimizers_of_matrices
from .prepare import prepare_model_for_training, quantize_experts

__all__ = ["prepare_model_for_training", "quantize_experts", "refuse_optimizers_of_matrices", "watch_gradients"]
