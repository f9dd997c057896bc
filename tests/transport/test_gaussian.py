import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.linalg import sqrtm

from genjax.transport import gaussian_entropic_ot, gaussian_wasserstein, sinkhorn


def gaussians(d, seed=0):
    rng = np.random.default_rng(seed)

    def one():
        root = rng.standard_normal((d, d + 2)) / np.sqrt(d)
        return jnp.asarray(rng.standard_normal(d)), jnp.asarray(root @ root.T)

    return (*one(), *one())


@pytest.mark.parametrize("d", [1, 2, 7])
def test_wasserstein_against_scipy(x64, compiled, d):
    m0, a, m1, b = gaussians(d)
    root = sqrtm(np.asarray(a))
    cross = np.trace(np.real(sqrtm(root @ np.asarray(b) @ root)))
    expected = np.sum((m0 - m1) ** 2) + np.trace(a) + np.trace(b) - 2 * cross
    np.testing.assert_allclose(compiled(gaussian_wasserstein)(m0, a, m1, b), expected, rtol=1e-9)


def entropic_by_definition(m0, a, m1, b, epsilon):
    """Maximise over the cross-covariance K of a Gaussian coupling, by its stationarity."""
    s2 = epsilon / 2
    a, b = np.asarray(a), np.asarray(b)
    root = np.real(sqrtm(a))
    inner = np.real(sqrtm(root @ b @ root + s2**2 / 4 * np.eye(len(a))))
    k = root @ inner @ np.linalg.inv(root) - s2 / 2 * np.eye(len(a))
    joint = np.block([[a, k], [k.T, b]])
    kl = 0.5 * (np.linalg.slogdet(a)[1] + np.linalg.slogdet(b)[1] - np.linalg.slogdet(joint)[1])
    return np.sum((m0 - m1) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(k) + epsilon * kl


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 30.0])
def test_entropic_against_the_optimal_coupling(x64, compiled, d, epsilon):
    args = gaussians(d)
    value = compiled(gaussian_entropic_ot)(*args, epsilon=jnp.asarray(epsilon))
    np.testing.assert_allclose(value, entropic_by_definition(*args, epsilon), rtol=1e-9)


def test_entropic_tends_to_wasserstein(x64):
    args = gaussians(4)
    limit = gaussian_wasserstein(*args)
    np.testing.assert_allclose(gaussian_entropic_ot(*args, epsilon=1e-9), limit, rtol=1e-6)


def test_gradients(x64):
    m0, a, m1, b = gaussians(3)
    check_grads(
        jax.jit(gaussian_wasserstein),
        (m0, a, m1, b),
        order=1,
        modes=["fwd", "rev"],
    )
    check_grads(
        jax.jit(lambda *z: gaussian_entropic_ot(*z[:4], epsilon=z[4])),
        (m0, a, m1, b, jnp.asarray(0.7)),
        order=1,
        modes=["fwd", "rev"],
    )


def test_equal_and_singular_covariances(compiled):
    zero, eye = jnp.zeros(3), jnp.eye(3)
    line = jnp.diag(jnp.asarray([1.0, 0.0, 0.0]))
    run = compiled(jax.value_and_grad(gaussian_wasserstein, argnums=(0, 1, 2, 3)))
    for a, b in ((eye, eye), (line, line), (line, eye), (0 * eye, eye), (0 * eye, 0 * eye)):
        value, grads = run(zero, a, zero, b)
        expected = np.sum((np.sqrt(np.diag(a)) - np.sqrt(np.diag(b))) ** 2)
        np.testing.assert_allclose(value, expected, atol=1e-6)
        assert all(jnp.isfinite(g).all() for g in grads)
    # At the minimum the gradient is zero.
    assert all(jnp.abs(g).max() < 1e-6 for g in run(zero, eye, zero, eye)[1])


@pytest.mark.parametrize("rotated", [False, True], ids=["diagonal", "rotated"])
def test_float32_keeps_small_eigenvalues(rotated):
    """Condition number 1e5, covariances that commute: sum (a_i^{1/2} - b_i^{1/2})^2."""
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0] if rotated else np.eye(4)
    a, b = np.array([3.0, 0.2, 4e-3, 3e-5]), np.array([3.0, 0.2, 1e-2, 3e-4])
    zero, *covs = (
        jnp.asarray(z, jnp.float32) for z in (np.zeros(4), turn * a @ turn.T, turn * b @ turn.T)
    )
    run = jax.jit(jax.value_and_grad(lambda a, b: gaussian_wasserstein(zero, a, zero, b), (0, 1)))
    value, grads = run(*covs)
    # float32 rounds a turned covariance itself, by 1e-7 of the largest eigenvalue.
    rtol = 2e-2 if rotated else 1e-4
    np.testing.assert_allclose(value, np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=rtol)
    for grad, expected in zip(grads, (1 - np.sqrt(b / a), 1 - np.sqrt(a / b)), strict=True):
        np.testing.assert_allclose(turn.T @ grad @ turn, np.diag(expected), atol=3 * rtol)


def test_never_negative_and_zero_for_equal_covariances():
    root = np.random.default_rng(0).normal(size=(20, 6, 6)).astype(np.float32)
    root[:10, :, 3:] = 0  # singular
    root *= np.float32(10.0) ** np.arange(-3, 3).astype(np.float32)[:, None]
    cov = root @ root.transpose(0, 2, 1)
    run = jax.jit(jax.vmap(lambda a, b: gaussian_wasserstein(jnp.zeros(6), a, jnp.zeros(6), b)))
    trace = np.trace(cov, axis1=1, axis2=2)
    np.testing.assert_array_equal(run(cov, cov), 0)
    value = np.asarray(run(cov, cov * np.float32(1 + 1e-6)))
    assert np.all(value >= 0)
    assert np.all(value < 1e-7 * trace)


def test_hessian_where_eigenvalues_repeat():
    """Along s I: d (s^{1/2} - 1)^2 has the second derivative d / (2 s^{3/2}); mixed, to B = r I."""
    zero, eye = jnp.zeros(3), jnp.eye(3)

    def along(s, r):
        return gaussian_wasserstein(zero, s * eye, zero, r * eye)

    with jax.debug_nans(True):
        hessian = jax.jit(jax.hessian(along, (0, 1)))(jnp.float32(4), jnp.float32(1))
        expected = [[3 / 16, -3 / 4], [-3 / 4, 3 * 2 / 2]]
        np.testing.assert_allclose(hessian, expected, rtol=1e-5)
        twice = jax.grad(lambda s: jax.grad(along)(s, jnp.float32(1)))
        np.testing.assert_allclose(jax.jit(twice)(jnp.float32(4)), 3 / 16, rtol=1e-5)


@pytest.mark.parametrize("rank", [3, 2])
def test_second_derivatives(x64, rank):
    """Against differences of first derivatives; a singular A for the entropic cost alone."""
    m0, a, m1, b = gaussians(3)
    root = jnp.linalg.cholesky(a)[:, :rank]

    def slopes(a, b, s):
        def loss(a, b, s):
            if rank == 3:
                plain = gaussian_wasserstein(m0, a, m1, b)
                return plain + gaussian_entropic_ot(m0, a, m1, b, epsilon=s)
            return gaussian_entropic_ot(m0, a, m1, b, epsilon=s)

        return jax.grad(loss, (0, 1, 2))(a, b, s)

    rng = np.random.default_rng(1)
    at = (root @ root.T, b, jnp.asarray(0.7))
    along = tuple(jnp.asarray(rng.normal(size=z.shape)) for z in at)
    tilt = jnp.asarray(rng.normal(size=root.shape))
    along = (root @ tilt.T + tilt @ root.T, along[1] + along[1].T, along[2])
    got = jax.jit(lambda *z: jax.jvp(slopes, z, along))(*at)[1]

    def moved(h):
        r = root + h * tilt
        return slopes(r @ r.T, b + h * along[1], at[2] + h * along[2])

    ahead, behind = jax.jit(lambda h: (moved(h), moved(-h)))(1e-5)
    for exact, up, down in zip(got, ahead, behind, strict=True):
        np.testing.assert_allclose(exact, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


def test_samples_meet_the_closed_form():
    rng = np.random.default_rng(0)
    m0, a, m1, b = gaussians(2, seed=3)
    n, epsilon = 1000, 1.0
    x = rng.multivariate_normal(m0, a, n).astype(np.float32)
    y = rng.multivariate_normal(m1, b, n).astype(np.float32)
    sample = jax.jit(lambda x, y: sinkhorn(x, y, epsilon=epsilon).value)(
        jnp.asarray(x), jnp.asarray(y)
    )
    m0, a, m1, b = (jnp.asarray(z, jnp.float32) for z in (m0, a, m1, b))
    exact = gaussian_entropic_ot(m0, a, m1, b, epsilon=epsilon)
    # Sampling error of the mean of |x - y|^2 over 1000 pairs.
    np.testing.assert_allclose(sample, exact, rtol=0.08)
    fitted = gaussian_entropic_ot(
        *(jnp.asarray(z, jnp.float32) for z in (x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))),
        epsilon=epsilon,
    )
    np.testing.assert_allclose(sample, fitted, rtol=0.02)


def test_what_is_not_finite_gives_no_plausible_number(compiled):
    m, a = jnp.zeros(2), jnp.eye(2)
    entropic = compiled(gaussian_entropic_ot)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for cov in (a.at[0, 1].set(bad), a.at[1, 1].set(bad)):
            for covs in ((cov, a), (a, cov)):
                args = (m, covs[0], m, covs[1])
                assert jnp.isnan(compiled(gaussian_wasserstein)(*args))
                assert jnp.isnan(entropic(*args, epsilon=jnp.asarray(1.0)))
    for epsilon in (0.0, -1.0):
        assert jnp.isnan(jax.jit(gaussian_entropic_ot)(m, a, m, a, epsilon=jnp.asarray(epsilon)))


def test_bad_input(unchecked):
    m, a = jnp.zeros(2), jnp.eye(2)
    with pytest.raises(ValueError, match=r"cov1 must have shape \(2, 2\), got \(3, 3\)"):
        gaussian_wasserstein(m, a, m, jnp.eye(3))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        gaussian_entropic_ot(m, a, m, a, epsilon=0.0)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e18, 1e30])
def test_large_variances_scale(scale):
    """A = s I, B = 4 s I: squared distance 2 s, and with epsilon = s / 10 in proportion."""
    mean, eye = jnp.zeros(2), jnp.eye(2)
    given = mean, scale * eye, mean, 4 * scale * eye
    np.testing.assert_allclose(gaussian_wasserstein(*given) / scale, 2, rtol=1e-5)
    one = gaussian_entropic_ot(mean, eye, mean, 4 * eye, epsilon=0.1)
    found = gaussian_entropic_ot(*given, epsilon=0.1 * scale)
    np.testing.assert_allclose(found / scale, one, rtol=1e-5)
