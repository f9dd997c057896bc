"""Denoising score matching: what a network may predict, how predictions convert, losses.

Everything else in this family takes a denoiser: a callable (x_t, t) -> E[x_0 | x_t]. `denoiser`
makes one of a network that predicts x_0, noise, score, v, EDM's residual or a velocity, and
`flow_denoiser` of a flow-matching network, whose clock runs the other way.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.schedules import Process, Scalar, derivative
from genjax.diffusion.times import TimesFn, uniform_times
from genjax.numerics import at_least_float32, expand_to, sum_event
from genjax.typing import DenoiserFn, PRNGKey, VelocityFn

PREDICTIONS = ("x0", "epsilon", "score", "v", "edm", "velocity")
# times [batch] -> weight on |x_0 - D|^2 [batch]
WeightFn: TypeAlias = Callable[[Array], Array]


def check_times(t: Array | float | int, process: Process, name: str = "t") -> None:
    """Raise ValueError where concrete times leave [0, t_max], its rounding to float32 included."""
    if checks.is_concrete(process.t_max):
        checks.between(name, t, 0, max(float(process.t_max), float(np.float32(process.t_max))))


def _components(
    kind: str, process: Process, t: Array, sigma_data: Scalar
) -> tuple[Array, Array, Array]:
    """(p, q, alpha q - sigma p) with prediction = p x_0 + q eps; the last without cancellation."""
    alpha, sigma, ratio = process.alpha(t), process.sigma(t), process.noise_ratio(t)
    one = jnp.ones_like(alpha)
    if kind == "x0":
        return one, 0 * one, -sigma
    if kind == "epsilon":
        return 0 * one, one, alpha
    if kind == "score":
        return 0 * one, -1 / _positive(sigma), -alpha / _positive(sigma)
    if kind == "v":
        return -sigma, alpha, alpha**2 + sigma**2
    if kind == "velocity":
        # At t = 0 the slope of sigma may be infinite; just above it is finite.
        above = jnp.maximum(t, 1e-3 * process.t_min)
        p, q = derivative(process.log_alpha, t) * alpha, derivative(process.sigma, above)
        return p, q, alpha * q - sigma * p
    total = jnp.sqrt(ratio**2 + sigma_data**2)
    return ratio / (sigma_data * total), -sigma_data / total, -alpha * total / sigma_data


def _positive(x: Array) -> Array:
    """The value, at least tiny^(3/16): a division by it stays finite at sigma = 0."""
    # A score's loss divides by its fourth power: 1e28 in float32, times errors of up to 1e10.
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny ** 0.1875)


def convert(
    value: Float[Array, "batch *event"],
    x_t: Float[Array, "batch *event"],
    t: Float[Array, " batch"],
    *,
    source: str,
    target: str,
    process: Process,
    sigma_data: Scalar = 0.5,
) -> Float[Array, "batch *event"]:
    """Turn a prediction of one kind into the equal prediction of another.

    With x_t = alpha x_0 + sigma eps: "x0"; "epsilon"; "score" = -eps / sigma; "v" = alpha eps -
    sigma x_0 (Salimans & Ho 2022); "edm" = (x_0 - c_skip x_t / alpha) / c_out (Karras et al. 2022,
    eq. 7, at noise level sigma / alpha); "velocity" = alpha' x_0 + sigma' eps, for `RectifiedFlow`
    eps - x_0 (Lipman et al. 2023, eq. 15; its negative in the clock of flow matching, see
    `flow_denoiser`). Computed from the pair (x_0, eps), so nothing cancels.

    >>> x, t = jnp.ones((2, 3)), jnp.full(2, 0.5)
    >>> options = dict(process=VariancePreserving(), source="x0", target="epsilon")
    >>> convert(0 * x, x, t, **options).shape
    (2, 3)
    """
    checks.one_of("source", source, PREDICTIONS)
    checks.one_of("target", target, PREDICTIONS)
    checks.same_shape(value=value, x_t=x_t)
    checks.shape("t", t, x_t.shape[:1])
    check_times(t, process)
    if source == target:
        return value
    value, x_t, t = at_least_float32(value), at_least_float32(x_t), at_least_float32(t)
    p, q, det = (expand_to(c, x_t) for c in _components(source, process, t, sigma_data))
    alpha, sigma = expand_to(process.alpha(t), x_t), expand_to(process.sigma(t), x_t)
    if source == "x0":
        x0, eps = value, (x_t - alpha * value) / _positive(sigma)
    else:
        x0, eps = (q * x_t - sigma * value) / det, (alpha * value - p * x_t) / det
    p, q, _ = (expand_to(c, x_t) for c in _components(target, process, t, sigma_data))
    return p * x0 + q * eps


def denoiser(
    network: DenoiserFn, *, process: Process, prediction: str = "x0", sigma_data: Scalar = 0.5
) -> DenoiserFn:
    """Make a denoiser (x_t, t) -> E[x_0 | x_t] of a network that predicts `prediction`.

    "edm" preconditions (Karras et al. 2022, eq. 7): with s = sigma / alpha, y = x_t / alpha,
    D = c_skip y + c_out network(c_in y, log(s) / 4), c_skip = s_d^2 / (s^2 + s_d^2),
    c_out = s s_d / sqrt(s^2 + s_d^2), c_in = 1 / sqrt(s^2 + s_d^2). Others see (x_t, t) as it is.

    >>> network = lambda x, t: 0 * x
    >>> denoise = denoiser(network, process=EDM(), prediction="edm")
    >>> denoise(jnp.ones((2, 3)), jnp.ones(2)).round(3)[0]
    Array([0.2, 0.2, 0.2], dtype=float32)
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.positive("sigma_data", sigma_data)

    def denoise(x_t: Array, t: Array) -> Array:
        x_t, t = at_least_float32(x_t), at_least_float32(t)
        if prediction != "edm":
            value = at_least_float32(network(x_t, t))
        else:
            ratio, scale = process.noise_ratio(t), jnp.exp(-process.log_alpha(t))
            c_in = scale / jnp.sqrt(ratio**2 + sigma_data**2)
            c_noise = 0.25 * jnp.log(_positive(ratio))
            value = at_least_float32(network(expand_to(c_in, x_t) * x_t, c_noise))
        return convert(
            value,
            x_t,
            t,
            source=prediction,
            target="x0",
            process=process,
            sigma_data=sigma_data,
        )

    return denoise


def flow_denoiser(velocity: VelocityFn, *, process: Process) -> DenoiserFn:
    """Make a denoiser for any process of a flow-matching velocity, E[x_0 - eps | x at time u].

    `velocity` has the clock of `genjax.flows`: noise at u = 0, data at u = 1, along the straight
    path u x_0 + (1 - u) eps. The state of `process` whose sigma / alpha is l lies on that path at
    u = 1 / (1 + l) after division by alpha + sigma; there D = x + (1 - u) velocity(x, u).

    >>> velocity = lambda x, u: -x
    >>> denoise = flow_denoiser(velocity, process=EDM())
    >>> denoise(jnp.ones((2, 3)), jnp.ones(2)).shape
    (2, 3)
    """

    def denoise(x_t: Array, t: Array) -> Array:
        x_t, t = at_least_float32(x_t), at_least_float32(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x, u = x_t / expand_to(alpha + sigma, x_t), alpha / (alpha + sigma)
        return x + expand_to(sigma / (alpha + sigma), x) * at_least_float32(velocity(x, u))

    return denoise


def loss_weight(
    weighting: str | WeightFn, t: Float[Array, " batch"], process: Process, sigma_data: Scalar = 0.5
) -> Float[Array, " batch"]:
    """Weight on |x_0 - D|^2 that makes it the squared error of the named prediction.

    "x0": 1; "epsilon": (alpha / sigma)^2; "score": (alpha / sigma^2)^2; "v": (alpha^2 + sigma^2)^2
    / sigma^2; "edm": (s^2 + s_d^2) / (s s_d)^2 with s = sigma / alpha; "velocity": (alpha d
    log s / dt)^2 (1 / t^2 for `RectifiedFlow`); "likelihood": half of g^2 times "score" (Song et
    al. 2021b); "min_snr": min((alpha / sigma)^2, 5) (Hang et al. 2023, eq. 7; `min_snr` has other
    bounds than 5). A callable gives its own weight of t.

    >>> loss_weight("epsilon", jnp.array([1.0, 2.0]), EDM())
    Array([1.  , 0.25], dtype=float32)
    """
    if callable(weighting):
        weight = jnp.asarray(weighting(t))
        checks.shape("what weighting returns", weight, t.shape)
        return weight
    checks.one_of("weighting", weighting, [*PREDICTIONS, "likelihood", "min_snr"])
    checks.min_rank("t", t, 1)
    if weighting == "min_snr":
        return min_snr(process)(t)
    alpha, sigma = process.alpha(t), _positive(process.sigma(t))
    if weighting == "likelihood":
        return 0.5 * process.diffusion_squared(t) * (alpha / sigma**2) ** 2
    if weighting == "x0":
        return jnp.ones_like(alpha)
    _, _, det = _components(weighting, process, t, sigma_data)
    # An error e in x_0 at fixed x_t is -alpha/sigma e in eps, so p e + q (-alpha/sigma) e.
    return (det / sigma) ** 2


def min_snr(process: Process, bound: Scalar = 5.0) -> WeightFn:
    """min((alpha / sigma)^2, bound), as `weighting`: the noise's error, but bounded near the data.

    Times |x_0 - D|^2, whatever the network predicts (Hang et al. 2023, eq. 7, gamma = bound).

    >>> min_snr(EDM())(jnp.array([0.1, 1.0]))
    Array([5., 1.], dtype=float32)
    """
    checks.positive("bound", bound)
    return lambda t: jnp.exp(jnp.minimum(process.log_snr(t), jnp.log(bound)))


def denoising_score_matching(
    denoise: DenoiserFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    prediction: str = "x0",
    weighting: str | WeightFn = "epsilon",
    times: TimesFn | Float[Array, " batch"] | None = None,
    noise: Float[Array, "batch *event"] | None = None,
    sigma_data: Scalar = 0.5,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """Denoising score matching: w(t) |x_0 - D(alpha x_0 + sigma eps, t)|^2, summed over the event.

    `denoise` maps (x_t, t) to a prediction of kind `prediction`; `weighting` names the kind whose
    squared error is the loss ("epsilon": DDPM's L_simple, Ho et al. 2020, eq. 14; "edm": Karras et
    al. 2022), whatever the network predicts. `times` is drawn per batch, low-discrepancy and
    uniform in [t_min, t_max] by default. Returns (losses [batch], aux: "x0_error", "time").
    Raises for integer data, an unknown kind, times outside the range or a denoiser that changes
    the shape. Vincent 2011; Song et al. 2021, eq. 7.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> x = jax.random.normal(jax.random.key(0), (8, 2))
    >>> losses, aux = denoising_score_matching(denoise, jax.random.key(1), x, process=EDM())
    >>> losses.shape
    (8,)
    """
    checks.min_rank("x", x, 1)
    checks.floating("x", x)
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.positive("sigma_data", sigma_data)
    time_key, noise_key = jax.random.split(key)
    x = at_least_float32(x)
    times = uniform_times(process) if times is None else times
    t = jnp.asarray(times(time_key, x.shape[0]) if callable(times) else times)
    checks.shape("times", t, x.shape[:1])
    check_times(t, process, "times")
    t = t.astype(x.dtype)
    eps = jax.random.normal(noise_key, x.shape, x.dtype) if noise is None else noise
    checks.shape("noise", eps, x.shape)
    x_t = expand_to(process.alpha(t), x) * x + expand_to(process.sigma(t), x) * eps
    value = denoise(x_t, t)
    same_shape(value, x)
    space = weighting if isinstance(weighting, str) and weighting in PREDICTIONS else "x0"
    options = {"process": process, "sigma_data": sigma_data}
    value = convert(at_least_float32(value), x_t, t, source=prediction, target=space, **options)
    p, q, _ = (expand_to(c, x) for c in _components(space, process, t, sigma_data))
    error = sum_event(jnp.square(p * x + q * eps - value))
    x0_error = error / loss_weight(space, t, process, sigma_data)
    if space != weighting:
        error = x0_error * loss_weight(weighting, t, process, sigma_data)
    return error, {"x0_error": x0_error, "time": t}


def same_shape(value: Array, x: Array) -> None:
    """Raise ValueError where a denoiser changed the shape."""
    if value.shape != x.shape:
        raise ValueError(f"denoiser must keep the shape {x.shape}, it returned {value.shape}")
