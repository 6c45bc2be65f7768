"""The custom calls that exported programs hold."""

from jax import export
from operations import TARGETS

# jax vouches for the stability of its own custom calls only.
OURS = [export.DisabledSafetyCheck.custom_call(f"syntonic_{target}") for target in TARGETS]
