import pytest

pytest.register_assert_rewrite(
    "layer_contract",
    "norm_contract",
    "batch_norm_contract",
    "softmax_layer_contract",
    "attention_contract",
    "training_contract",
)
