"""Array and callable types shared by every room.

A network is a plain callable; the aliases below say what each family calls it with.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Key, PyTree, UInt32

PRNGKey: TypeAlias = Key[Array, ""] | UInt32[Array, "2"]
Params: TypeAlias = PyTree[Any]
Batch: TypeAlias = PyTree[Any]

# x [batch, *event] -> (mean [batch, latent], log_var [batch, latent])
EncoderFn: TypeAlias = Callable[[Array], tuple[Array, Array]]
# (x [batch, *event], z [batch, latent]) -> log p(x | z) [batch], nats
LogLikelihoodFn: TypeAlias = Callable[[Array, Array], Array]
# x [batch, *event] -> log density [batch], nats
LogProbFn: TypeAlias = Callable[[Array], Array]
# x [batch, *event] -> scores [batch]
CriticFn: TypeAlias = Callable[[Array], Array]
# (x [batch, *event], t [batch]) -> [batch, *event]
DenoiserFn: TypeAlias = Callable[[Array, Array], Array]
VelocityFn: TypeAlias = Callable[[Array, Array], Array]
# (x [n, d], y [m, d]) -> cost [n, m]
CostFn: TypeAlias = Callable[[Array, Array], Array]
# (params, key, batch) -> (losses [batch], aux: named per-example terms [batch]), and with a carry
# (params, key, batch, carry) -> (losses, aux, seen), see `genjax.training.train_step`
LossFn: TypeAlias = Callable[..., tuple[Any, ...]]
# (carry, params, seen) -> carry
AbsorbFn: TypeAlias = Callable[[Any, Params, Any], Any]
