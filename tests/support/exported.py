"""The custom calls that exported programs hold."""

from jax import export

# The custom calls in each.
BATCH_NORM = {f"golden_batch_norm_{part}" for part in ("moments", "normalise", "sums")}
TARGETS = {
    "layernorm": {"phi_residual_layernorm", "phi_residual_layernorm_cotangent"},
    "layernorm_for_each": {"phi_residual_layernorm", "phi_residual_layernorm_cotangent"},
    "sum": {"phi_residual", "phi_residual_cotangent"},
    "gelu": {"phi_residual", "phi_residual_cotangent"},
    "golden_gelu": {"golden_gelu", "golden_gelu_cotangent"},
    "crystallize": {"crystallize"},
    "norm": {"sum_of_squares", "sum_of_squares_cotangent"},
    "batch_norm": BATCH_NORM,
    "batch_norm_first": BATCH_NORM,
    "batch_norm_inference": BATCH_NORM - {"golden_batch_norm_moments"},
    "layer_norm": {"golden_layer_norm", "golden_layer_norm_cotangent"},
    "layer_norm_axes": {"golden_layer_norm", "golden_layer_norm_cotangent"},
    "softmax": {"softmax", "softmax_cotangent"},
    "log_softmax": {"softmax", "softmax_cotangent"},
    "cross_entropy": {"cross_entropy", "cross_entropy_cotangent"},
}
# jax vouches for the stability of its own custom calls only.
OURS = [
    export.DisabledSafetyCheck.custom_call(f"syntonic_{target}")
    for target in set().union(*TARGETS.values())
]
