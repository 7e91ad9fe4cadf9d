"""Computation of a layer of experts: routed rows, grouped products, low-rank terms.

Letters: T tokens, K experts chosen per token, E experts, S = T * K routed rows, H hidden size, I intermediate size,
R rank. Rows are sorted by expert; `offsets (E,)` int32 holds the exclusive end of each expert's rows.
"""

from .decode_matrix import decode_matrix
from .dispatch import LARGEST_RANK, ComputePath, choose_library_path, choose_path, log_once, why_no_kernels
from .grouped_linear import LowRank, grouped_linear
from .held_casts import HeldCasts
from .kept_activations import keep_experts, kept_nbytes, leave_regions, with_backward, without_output
from .kernels.tuning import tiles_origin
from .linear_lora import StoredMatrix, bias_gradient, linear_dtype, linear_lora, low_rank_term, without_autocast
from .operands import Factors, Gate, packed_weight, why_not_read
from .routing import Routing, combine_rows, gather_rows, route

__all__ = [
    "LARGEST_RANK",
    "ComputePath",
    "Factors",
    "Gate",
    "HeldCasts",
    "LowRank",
    "Routing",
    "StoredMatrix",
    "bias_gradient",
    "choose_library_path",
    "choose_path",
    "combine_rows",
    "decode_matrix",
    "gather_rows",
    "grouped_linear",
    "keep_experts",
    "kept_nbytes",
    "leave_regions",
    "linear_dtype",
    "linear_lora",
    "log_once",
    "low_rank_term",
    "packed_weight",
    "route",
    "tiles_origin",
    "why_no_kernels",
    "why_not_read",
    "with_backward",
    "without_autocast",
    "without_output",
]
