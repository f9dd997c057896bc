"""The matrices that a state space layer begins with: HiPPO, its diagonal plus low rank form, S4D.

All are computed in float64 and rounded once. Complex models keep one state of each conjugate pair:
N / 2 numbers for N real states.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from genjax import checks

__all__ = ["DPLR", "dplr", "hippo_legs", "s4d_inv", "s4d_lin", "s4d_real"]


class DPLR(NamedTuple):
    """A = V (diag(eigenvalues) - p p^*) V^* and B = V b, one of each conjugate pair.

    A real vector is C in the basis of x as `C @ basis`, and a state is 2 Re(basis x).
    """

    eigenvalues: Complex[Array, " pairs"]
    p: Complex[Array, " pairs"]
    b: Complex[Array, " pairs"]
    basis: Complex[Array, "states pairs"]


def _legs(num_states: int) -> tuple[np.ndarray, np.ndarray]:
    n = np.arange(num_states)
    roots = np.sqrt(2 * n + 1)
    return -np.tril(np.outer(roots, roots), -1) - np.diag(n + 1.0), roots


def hippo_legs(
    num_states: int, dtype: Any = jnp.float32
) -> tuple[Float[Array, "states states"], Float[Array, " states"]]:
    """HiPPO-LegS, (A, B): the state holds the Legendre coefficients of the past.

    A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it, 0 above; B_n = sqrt(2n + 1).
    With x' = (A x + B u) / t the x_n are the coefficients of u on [0, t] in the Legendre
    polynomials of norm 1 under the uniform law; S4 drops the 1 / t. Gu et al. 2020
    (arXiv:2008.07669), Theorem 2. Raises unless num_states is an integer of at least 1.

    >>> A, B = hippo_legs(64)
    """
    checks.integer("num_states", num_states, 1)
    a, b = _legs(num_states)
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def dplr(num_states: int, dtype: Any = jnp.complex64) -> DPLR:
    """HiPPO-LegS as diagonal plus low rank: A + P P^T = -1/2 + S with P_n = sqrt(n + 1/2), S skew.

    S has the eigenvalues i w in pairs, and eigenvectors that are orthogonal, so that the change of
    basis loses nothing; A's own eigenvectors have a condition that grows exponentially with N.
    Gu, Goel, Re 2022 (arXiv:2111.00396), Theorem 1 and Appendix C. Raises ValueError unless
    num_states is even and at least 2: of an odd number one eigenvalue has no partner.

    >>> start = dplr(64)
    >>> dplr_kernel(*start[:3], jnp.ones(64) @ start.basis, 0.01, 1024).shape
    (1024,)
    """
    _even(num_states)
    a, b = _legs(num_states)
    p = np.sqrt(np.arange(num_states) + 0.5)
    # -i S is Hermitian: eigh gives orthogonal vectors, which eig does not.
    frequencies, vectors = np.linalg.eigh(-1j * (a + np.outer(p, p) + np.eye(num_states) / 2))
    order = np.argsort(frequencies)[num_states // 2 :]
    frequencies, vectors = frequencies[order], vectors[:, order]
    parts = (-0.5 + 1j * frequencies, vectors.conj().T @ p, vectors.conj().T @ b, vectors)
    return DPLR(*(jnp.asarray(part, dtype) for part in parts))


def s4d_lin(num_states: int, dtype: Any = jnp.complex64) -> Complex[Array, " pairs"]:
    """S4D-Lin, -1/2 + i pi n for n < N / 2 (Gu et al. 2022, arXiv:2206.11893, equation (9)).

    >>> s4d_lin(4)
    Array([-0.5+0.j       , -0.5+3.1416j], dtype=complex64)
    """
    return _diagonal(num_states, lambda n: -0.5 + 1j * np.pi * n, dtype)


def s4d_inv(num_states: int, dtype: Any = jnp.complex64) -> Complex[Array, " pairs"]:
    """S4D-Inv, -1/2 + i (N / pi)(N / (2n + 1) - 1) for n < N / 2, N all states, not pairs.

    The spectrum of HiPPO-LegS for large N (Gu et al. 2022, arXiv:2206.11893, equation (8)).

    >>> s4d_inv(4).shape
    (2,)
    """
    scale = num_states / np.pi
    return _diagonal(
        num_states, lambda n: -0.5 + 1j * scale * (num_states / (2 * n + 1) - 1), dtype
    )


def s4d_real(num_states: int, dtype: Any = jnp.complex64) -> Complex[Array, " pairs"]:
    """S4D-Real, -(n + 1) for n < N / 2 (Gu et al. 2022, arXiv:2206.11893), as complex numbers.

    >>> s4d_real(4)
    Array([-1.+0.j, -2.+0.j], dtype=complex64)
    """
    return _diagonal(num_states, lambda n: -(n + 1.0) + 0j, dtype)


def _diagonal(num_states: int, formula: Any, dtype: Any) -> Array:
    _even(num_states)
    return jnp.asarray(formula(np.arange(num_states // 2)), dtype)


def _even(num_states: int) -> None:
    checks.integer("num_states", num_states, 2)
    if num_states % 2:
        raise ValueError(f"num_states must be even (conjugate pairs), got {num_states}")
