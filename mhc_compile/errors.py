"""Every error a user can meet.

A leaf module: all rooms may import it, it imports nothing of ours. A message says what happened,
where (``file:line`` of the user's model where one is known) and what to do about it.
"""


class MHCError(Exception):
    """Base of all errors raised on purpose by mhc-compile."""


class ConfigError(MHCError, ValueError):
    """A value of `MHCConfig` (or of the backend's ``options``) is not allowed."""


class UnsupportedGraphError(MHCError, RuntimeError):
    """A graph cannot be rewritten faithfully; the model was left as it was."""


class NotCompiledError(MHCError, RuntimeError):
    """A converted model ran without the "mhc" backend, which would be the plain network."""


class KernelError(MHCError, RuntimeError):
    """An mhc op was called with shapes, dtypes or options it does not support."""


class VerificationError(MHCError, AssertionError):
    """A checked property (function preserved, gradients, stochasticity) does not hold."""


class MHCWarning(UserWarning):
    """Something the user should know, and that does not make results wrong."""
