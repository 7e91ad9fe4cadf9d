"""Training beyond the experts: preparing a model, how its decoder layers run, and checks of its gradients."""

from ..ops import keep_experts
from .ddp_broadcast import skip_broadcast
from .fsdp2 import shard_layers
from .gradient_watch import watch_gradients
from .layer_runner import graphs_report, release_graphs
from .liger_head import refuse_liger_head
from .optimizer_check import refuse_optimizers_of_matrices
from .prepare import prepare_model_for_training, quantize_experts
from .unsynced_adamw import UnsyncedAdamW8bit

__all__ = [
    "UnsyncedAdamW8bit",
    "graphs_report",
    "keep_experts",
    "prepare_model_for_training",
    "quantize_experts",
    "refuse_liger_head",
    "refuse_optimizers_of_matrices",
    "release_graphs",
    "shard_layers",
    "skip_broadcast",
    "watch_gradients",
]
