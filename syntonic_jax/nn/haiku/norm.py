"""Normalisation layers for Haiku: what `syntonic_jax.nn.haiku` has of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from syntonic_jax import _check, golden_batch_norm_inference
from syntonic_jax.nn._shared import arguments
from syntonic_jax.nn._shared.framework import required
from syntonic_jax.nn._shared.norm import broadcast_to_rank, sorted_axes
from syntonic_jax.ops._norms_of_layers import affine, layer_norm, others
from syntonic_jax.ops.golden_batch_norm import finite_batch_norm

with required("haiku", "haiku"):
    import haiku as hk


def reduced_and_held(
    layer: str, shape: tuple[int, ...], axis: Any, param_axis: Any
) -> tuple[tuple[int, ...], list[int]]:
    """The axes that a norm of rows reduces, and the shape in which Haiku holds its parameters."""

    def axes(argument: str, given: Any) -> tuple[int, ...]:
        if isinstance(given, slice):
            given = range(len(shape))[given]
        return sorted_axes(layer, argument, given, len(shape))

    reduced, varying = axes("axis", axis), axes("param_axis", param_axis)
    if varying == (len(shape) - 1,):
        return reduced, list(shape[-1:])  # as in Haiku, for the sake of old checkpoints
    return reduced, [n if a in varying else 1 for a, n in enumerate(shape)]


class _Norm(hk.Module):
    """The parameters of a normalisation, created or passed."""

    def __init__(
        self,
        create_scale: bool,
        create_offset: bool,
        eps: float,
        scale_init: hk.initializers.Initializer | None,
        offset_init: hk.initializers.Initializer | None,
        name: str | None,
    ):
        super().__init__(name=name)
        layer = type(self).__name__
        arguments.flags(layer, create_scale=create_scale, create_offset=create_offset)
        if not create_scale and scale_init is not None:
            raise ValueError(f"{layer}: scale_init given with create_scale=False")
        if not create_offset and offset_init is not None:
            raise ValueError(f"{layer}: offset_init given with create_offset=False")
        self.create_scale = create_scale
        self.create_offset = create_offset
        self.eps = _check.epsilon(layer, eps, "eps")
        self.scale_init = scale_init or jnp.ones
        self.offset_init = offset_init or jnp.zeros

    def _parameters(self, x: Any, shape: Sequence[int], scale: Any, offset: Any) -> Any:
        """scale and offset, of the rank of x, and the dtype of y, which wide parameters widen."""
        layer, held = type(self).__name__, jnp.result_type(x)
        if self.create_scale:
            if scale is not None:
                raise ValueError(f"{layer}: scale passed with create_scale=True")
            scale = hk.get_parameter("scale", shape, held, init=self.scale_init)
        if self.create_offset:
            if offset is not None:
                raise ValueError(f"{layer}: offset passed with create_offset=True")
            offset = hk.get_parameter("offset", shape, held, init=self.offset_init)
        dtype = jnp.result_type(x, *(p for p in (scale, offset) if p is not None))
        return *broadcast_to_rank(layer, x, scale=scale, offset=offset), dtype


class _MovingAverage(hk.ExponentialMovingAverage):
    """Haiku's zero-debiased average, in float32 at least, with its state.

    In 16 bits a decay of 0.999 may be 1, and the average 0/0.
    """

    def __call__(self, value: jax.Array, update_stats: bool = True) -> jax.Array:
        """The average of the values until now, `value` among them."""
        dtype = jnp.promote_types(value.dtype, jnp.float32)
        counter = 1 + self._kept("counter", (), jnp.int32)
        hidden = self._kept("hidden", value.shape, dtype)
        # A checkpoint may hold 16 bits.
        dtype = jnp.promote_types(hidden.dtype, dtype)
        decay = jnp.asarray(self.decay, dtype)
        hidden = hidden.astype(dtype) * decay + value.astype(dtype) * (1 - decay)
        # 1 - decay**counter, without its cancellation.
        average = hidden / -jnp.expm1(counter.astype(dtype) * jnp.log1p(decay - 1))
        if update_stats:
            hk.set_state("counter", counter)
            hk.set_state("hidden", hidden)
            hk.set_state("average", average)
        return average

    def current(self) -> jax.Array:
        """The average as it is kept."""
        return self._kept("average")

    def _kept(self, name: str, shape: Any = None, dtype: Any = None) -> jax.Array:
        """A state, 0 to begin with, also where a getter, of mixed precision say, narrows it."""
        init = None if shape is None else jnp.zeros
        value = hk.get_state(name, shape, dtype, init=init)
        if value.dtype.itemsize < 4:
            return hk.get_current_state()[self.module_name][name]
        return value


class GoldenBatchNorm(_Norm):
    """``hk.BatchNorm`` with a target variance.

    Arguments up to ``name``, parameters (``scale`` and ``offset``, of the rank of the inputs and
    in their dtype), state (the moving averages ``mean_ema`` and ``var_ema``, in float32 or
    float64), initialisers and result dtype are those of ``hk.BatchNorm``, so parameters and state
    of one load into the other. Automatic names are made of the class: for those of a network with
    a ``batch_norm``, say ``name='batch_norm'``. What differs:

    - The result has the variance ``target_variance`` before ``scale`` and ``offset``. The moving
      averages are those of the inputs.
    - The variance is computed in two passes, and in float32 for 16-bit inputs; the result is
      rounded once.
    - The moving averages are float32 or float64 in computation and storage, whatever the dtype of
      the inputs and whatever the policy of `hk.mixed_precision`. ``hk.BatchNorm`` has them in the
      dtype of the inputs: in bfloat16 a decay of 0.999 is 1 there, and the average 0/0. A state of
      16 bits loads, and is float32 from the first update on.
    - Over ``cross_replica_axis`` the statistics are weighted by the number of entries.

    Args:
      create_scale: whether there is a ``scale``.
      create_offset: whether there is an ``offset``.
      decay_rate: weight of the old value in the moving averages, which are zero-debiased.
      eps: added to the variance.
      scale_init: initialiser of ``scale`` (default: ones).
      offset_init: initialiser of ``offset`` (default: zeros).
      axis: the axes over which the statistics run (default: all but the channels).
      cross_replica_axis: the mapped axis (of ``vmap``, ``pmap`` or ``shard_map``), or axes, over
        which the statistics are merged.
      cross_replica_axis_index_groups: groups of indices of that axis, each with statistics of
        its own.
      data_format: where the channels are, in any form that :func:`hk.get_channel_index` takes.
      name: the module's name.
      target_variance: see :func:`syntonic_jax.golden_batch_norm`.
      implementation: see :func:`syntonic_jax.golden_batch_norm`.

    Raises:
      ValueError: an initialiser for a parameter that is not created, groups without an axis, a
        negative eps, an unknown data format (when built); an axis that the inputs do not have,
        nothing to reduce, a bad target variance, a parameter both created and passed, or one
        that does not broadcast (when called).
      TypeError: inputs that are not real floating point.

    >>> import haiku as hk
    >>> import jax, jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.haiku import GoldenBatchNorm
    >>> x = jnp.array([[1.0], [3.0]])
    >>> norm = hk.transform_with_state(lambda x: GoldenBatchNorm(True, True, 0.9)(x, True))
    >>> parameters, state = norm.init(None, x)
    >>> y, state = norm.apply(parameters, state, None, x)
    >>> print(np.asarray(y).round(3).ravel())
    [-0.786  0.786]
    >>> print(np.asarray(state["golden_batch_norm/~/mean_ema"]["average"]).round(3))
    [[2.]]
    """

    def __init__(
        self,
        create_scale: bool,
        create_offset: bool,
        decay_rate: float,
        eps: float = 1e-5,
        scale_init: hk.initializers.Initializer | None = None,
        offset_init: hk.initializers.Initializer | None = None,
        axis: Sequence[int] | None = None,
        cross_replica_axis: str | Sequence[str] | None = None,
        cross_replica_axis_index_groups: Sequence[Sequence[int]] | None = None,
        data_format: str = "channels_last",
        name: str | None = None,
        *,
        target_variance: Any = "golden",
        implementation: str | None = None,
    ):
        super().__init__(create_scale, create_offset, eps, scale_init, offset_init, name)
        if cross_replica_axis is None and cross_replica_axis_index_groups is not None:
            raise ValueError(
                "GoldenBatchNorm: cross_replica_axis_index_groups given without cross_replica_axis"
            )
        if not isinstance(data_format, str):
            raise TypeError(f"GoldenBatchNorm: data_format must be a string, got {data_format!r}")
        self.axis = axis
        self.cross_replica_axis = cross_replica_axis
        self.cross_replica_axis_index_groups = cross_replica_axis_index_groups
        self.channel_index = hk.get_channel_index(data_format)
        decay_rate = arguments.momentum("GoldenBatchNorm", decay_rate, "decay_rate")
        self.mean_ema = _MovingAverage(decay_rate, name="mean_ema")
        self.var_ema = _MovingAverage(decay_rate, name="var_ema")
        self.target_variance = target_variance
        self.implementation = implementation

    def __call__(
        self,
        inputs: jax.Array,
        is_training: bool,
        test_local_stats: bool = False,
        scale: jax.Array | None = None,
        offset: jax.Array | None = None,
    ) -> jax.Array:
        """The normalised inputs, of their shape.

        The statistics are those of the inputs where ``is_training``, which also updates the
        moving averages, or ``test_local_stats`` is set; otherwise the moving averages. ``scale``
        and ``offset``, of any shape that broadcasts to that of the inputs, may be passed where
        they are not created.
        """
        name = "GoldenBatchNorm"
        _check.floating(name, inputs=inputs)
        shape = jnp.shape(inputs)
        arguments.flags(name, is_training=is_training, test_local_stats=test_local_stats)
        channels = self.channel_index % max(len(shape), 1)
        axis = [a for a in range(len(shape)) if a != channels] if self.axis is None else self.axis
        reduced = sorted_axes(name, "axis", axis, len(shape))
        axis = axis if isinstance(axis, Iterable) else (axis,)
        # hk.BatchNorm does not count negative axes here: parameters vary along these.
        held = [1 if a in axis else n for a, n in enumerate(shape)]
        scale, offset, dtype = self._parameters(inputs, held, scale, offset)
        features = others(inputs, reduced)
        settings: Any = {
            "axis": features,
            "target_variance": self.target_variance,
            "epsilon": self.eps,
            "implementation": self.implementation,
        }

        def train(scale, offset, dtype):
            return finite_batch_norm(
                inputs,
                scale,
                offset,
                axis_name=self.cross_replica_axis,
                axis_index_groups=self.cross_replica_axis_index_groups,
                dtype=dtype,
                **settings,
            )

        def infer(scale, offset, dtype):
            places = [shape[a] for a in features]
            mean, var = (ema.current().reshape(places) for ema in (self.mean_ema, self.var_ema))
            y = golden_batch_norm_inference(
                inputs, mean, var, scale, offset, dtype=dtype, **settings
            )
            return (y,)

        norm = train if is_training or test_local_stats else infer
        y, *statistics = affine(norm, inputs, scale, offset, features, dtype)
        if is_training:
            kept = [1 if a in reduced else n for a, n in enumerate(shape)]
            for ema, value in zip((self.mean_ema, self.var_ema), statistics):
                ema(value.reshape(kept))
        return y


class GoldenLayerNorm(_Norm):
    """``hk.LayerNorm`` with a target variance.

    Arguments up to ``param_axis``, parameters (``scale`` and ``offset``, in the dtype of the
    inputs), initialisers and result dtype are those of ``hk.LayerNorm``, so parameters of one
    load into the other. Automatic names are made of the class: for those of a network with a
    ``layer_norm``, say ``name='layer_norm'``. What differs:

    - The result has the variance ``target_variance`` before ``scale`` and ``offset``.
    - The variance is always computed in two passes (``use_fast_variance`` has no effect), and in
      float32 for 16-bit inputs; the result is rounded once.

    Parameters that vary along an axis that is not reduced are supported, but not in one pass.

    Args:
      axis: the axis over which the statistics run, or axes, or a slice of them.
      create_scale: whether there is a ``scale``.
      create_offset: whether there is an ``offset``.
      eps: added to the variance.
      scale_init: initialiser of ``scale`` (default: ones).
      offset_init: initialiser of ``offset`` (default: zeros).
      use_fast_variance: accepted, without effect.
      name: the module's name.
      param_axis: the axes along which ``scale`` and ``offset`` vary (default: the last).
      target_variance: see :func:`syntonic_jax.golden_layer_norm`.
      implementation: see :func:`syntonic_jax.golden_layer_norm`.

    Raises:
      ValueError: an initialiser for a parameter that is not created, a negative eps (when built);
        an axis that the inputs do not have, nothing to reduce, a bad target variance, a
        parameter both created and passed, or one that does not broadcast (when called).
      TypeError: inputs that are not real floating point.

    >>> import haiku as hk
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from syntonic_jax.nn.haiku import GoldenLayerNorm
    >>> norm = hk.transform(lambda x: GoldenLayerNorm(-1, True, True)(x))
    >>> x = jnp.arange(4.0)
    >>> print(np.asarray(norm.apply(norm.init(None, x), None, x)).round(3))
    [-1.055 -0.352  0.352  1.055]
    """

    def __init__(
        self,
        axis: int | Sequence[int] | slice,
        create_scale: bool,
        create_offset: bool,
        eps: float = 1e-5,
        scale_init: hk.initializers.Initializer | None = None,
        offset_init: hk.initializers.Initializer | None = None,
        use_fast_variance: bool = False,
        name: str | None = None,
        *,
        param_axis: int | Sequence[int] | slice | None = None,
        target_variance: Any = "golden",
        implementation: str | None = None,
    ):
        super().__init__(create_scale, create_offset, eps, scale_init, offset_init, name)
        self.axis = axis
        self.use_fast_variance = use_fast_variance
        self.param_axis = -1 if param_axis is None else param_axis
        self.target_variance = target_variance
        self.implementation = implementation

    def __call__(
        self,
        inputs: jax.Array,
        scale: jax.Array | None = None,
        offset: jax.Array | None = None,
    ) -> jax.Array:
        """The normalised inputs, of their shape.

        ``scale`` and ``offset``, of any shape that broadcasts to that of the inputs, may be
        passed where they are not created.
        """
        name = "GoldenLayerNorm"
        _check.floating(name, inputs=inputs)
        reduced, held = reduced_and_held(name, jnp.shape(inputs), self.axis, self.param_axis)
        scale, offset, dtype = self._parameters(inputs, held, scale, offset)
        return layer_norm(
            inputs,
            scale,
            offset,
            reduced,
            dtype,
            mapping={},
            epsilon=self.eps,
            target_variance=self.target_variance,
            implementation=self.implementation,
        )
