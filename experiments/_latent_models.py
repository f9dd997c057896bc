"""Models of latents that have unit variance: a flow or a diffusion model, with guidance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments._networks import make_network
from genjax import diffusion as gd
from genjax import flows


class Field(NamedTuple):
    """A model of scaled latents."""

    init: Callable[[Any], Any]
    loss: Callable[..., Any]  # (params, key, z, label) -> [batch], per number
    sample: Callable[..., jax.Array]  # (params, key, n, label) -> z


def make_field(config: Any, shape: tuple[int, ...], classes: int | None) -> Field:
    """A flow or a diffusion model of latents of that shape."""
    diffusion = config.model == "diffusion"
    network = make_network(config, shape, classes, norm="layer" if diffusion else "none")
    process = gd.EDM()

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *shape)), jnp.zeros(1))

    def velocity(params: Any, label: Any = None, key: Any = None) -> Callable[..., Any]:
        return lambda z, t: network.apply(params, z, t, label, dropout_key=key)

    def denoise(params: Any, label: Any = None, key: Any = None) -> Callable[..., jax.Array]:
        net = velocity(params, label, key)
        return gd.denoiser(net, process=process, prediction="edm", sigma_data=1.0)

    def guided(make: Callable[..., Any], params: Any, label: Any) -> Callable[..., jax.Array]:
        """U + guidance (C - U) over all channels; the rule is the same for velocities and means."""
        conditional = make(params, label)
        if label is None or config.guidance == 1:
            return conditional
        return gd.classifier_free_guidance(
            conditional, make(params), process=process, scale=config.guidance
        )

    def loss(params: Any, key: jax.Array, z: jax.Array, label: Any) -> jax.Array:
        key_noise, key_time, key_net = jax.random.split(key, 3)
        if diffusion:
            losses, _ = gd.denoising_score_matching(
                denoise(params, label, key_net),
                key_time,
                z,
                process=process,
                weighting="edm",
                times=gd.edm_times(process, mean=-0.4, std=1.4),
                noise=jax.random.normal(key_noise, z.shape),
                sigma_data=1.0,
            )
        else:
            x0 = jax.random.normal(key_noise, z.shape)
            losses, _ = flows.flow_matching_loss(velocity(params, label, key_net), key_time, x0, z)
        return losses / z[0].size

    def sample(params: Any, key: jax.Array, n: int, label: Any) -> jax.Array:
        if diffusion:
            return gd.sample(
                guided(denoise, params, label),
                key,
                (n, *shape),
                process=process,
                times=gd.time_grid(process, config.num_steps, spacing="edm"),
                step=gd.dpm_solver_step,
            )
        noise = jax.random.normal(key, (n, *shape))
        return flows.integrate(guided(velocity, params, label), noise, num_steps=config.num_steps)

    return Field(init, loss, sample)
