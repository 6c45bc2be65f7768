"""What a user reads when a framework is not installed."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def required(package: str, extra: str) -> Iterator[None]:
    """Turns the failed import of ``package`` into an ImportError that names the extra.

    An import that fails further inside an installed framework is left as it is: installing the
    extra would not mend it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"syntonic_jax.nn: the package {package!r} is not installed; "
            f"pip install 'syntonic-jax[{extra}]' brings it",
            name=package,
        ) from error
