"""Training: preparation of a model, execution of its decoder layers, and checks of optimizers and gradients."""

from ..ops import keep_experts
from .ddp_broadcast import skip_broadcast
from .fsdp2 import shard_layers
from .gradient_watch import watch_gradients
from .layer_runner import graphs_report, release_graphs
from .liger_head import refuse_liger_head
from .optimizer_check import refuse_optimizers_of_matrices
from .prepare import prepare_model_for_training, quantize_experts
from .trainable_dtype import cast_trainable_to_fp32
from .unsynced_adamw import UnsyncedAdamW8bit

__all__ = [
    "UnsyncedAdamW8bit",
    "cast_trainable_to_fp32",
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
