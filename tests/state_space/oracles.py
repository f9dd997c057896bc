"""Loops in numpy, in float64: what the models of genjax.state_space are held against."""

import json
from pathlib import Path

import numpy as np

REFERENCES = Path(__file__).parents[1] / "references"


def load(name):
    return json.loads((REFERENCES / f"{name}.json").read_text())


def number(x):
    """A complex array of the {re, im} of a reference."""
    return np.asarray(x["re"]) + 1j * np.asarray(x["im"])


def softplus(x):
    return np.logaddexp(0, x)


def selective(rng, length, batch=2, channels=3, states=4):
    """Inputs of `selective_scan`."""
    normal = rng.normal
    return {
        "u": normal(size=(batch, length, channels)),
        "dt": softplus(normal(size=(batch, length, channels)) - 1),
        "A": -np.exp(normal(size=(channels, states))),
        "B": normal(size=(batch, length, states)),
        "C": normal(size=(batch, length, states)),
        "D": normal(size=channels),
        "z": normal(size=(batch, length, channels)),
        "h0": normal(size=(batch, channels, states)),
    }


def selective_loop(u, dt, A, B, C, D, z, h0, where=None, zoh=False):
    h, ys = h0.copy(), np.zeros_like(u)
    for b in range(len(u)):
        for t in range(u.shape[1]):
            if where is not None and not where[b, t]:
                continue
            a = np.exp(dt[b, t][:, None] * A)
            gain = (a - 1) / A if zoh else dt[b, t][:, None]
            h[b] = a * h[b] + gain * B[b, t] * u[b, t][:, None]
            gate = z[b, t] / (1 + np.exp(-z[b, t]))
            ys[b, t] = (h[b] @ C[b, t] + D * u[b, t]) * gate
    return ys, h


def heads(rng, length, batch=2, heads=4, dim=3, groups=2, states=5):
    """Inputs of `ssd`."""
    normal = rng.normal
    return {
        "x": normal(size=(batch, length, heads, dim)),
        "dt": softplus(normal(size=(batch, length, heads)) - 1),
        "A": -np.exp(normal(size=heads)),
        "B": normal(size=(batch, length, groups, states)),
        "C": normal(size=(batch, length, groups, states)),
        "D": normal(size=heads),
        "h0": normal(size=(batch, heads, dim, states)),
    }


def ssd_loop(x, dt, A, B, C, D, h0, where=None):
    h, ys = h0.copy(), np.zeros_like(x)
    groups = B.shape[2]
    for b in range(len(x)):
        for t in range(x.shape[1]):
            if where is not None and not where[b, t]:
                continue
            for i in range(x.shape[2]):
                g = i // (x.shape[2] // groups)
                drive = dt[b, t, i] * np.outer(x[b, t, i], B[b, t, g])
                h[b, i] = np.exp(dt[b, t, i] * A[i]) * h[b, i] + drive
                ys[b, t, i] = h[b, i] @ C[b, t, g] + D[i] * x[b, t, i]
    return ys, h


def legs(num_states):
    """HiPPO-LegS entry by entry: A, B, P."""
    a = np.zeros((num_states, num_states))
    for n in range(num_states):
        for k in range(n):
            a[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
        a[n, n] = -(n + 1)
    n = np.arange(num_states)
    return a, np.sqrt(2 * n + 1), np.sqrt(n + 0.5)


def dense_kernel(a, b, c, dt, length):
    """C A_bar^l B_bar of a dense real or complex model by the bilinear rule, powers one by one."""
    eye = np.eye(len(a))
    left = np.linalg.inv(eye - dt / 2 * a)
    step, x, kernel = left @ (eye + dt / 2 * a), left @ (dt * b), []
    for _ in range(length):
        kernel.append(c @ x)
        x = step @ x
    return np.array(kernel)


def lti_loop(u, step, drive, read, d, h0, where=None):
    """x <- step x + drive u, y = read(x) + d u, one channel: u [length]."""
    h, ys = h0.copy(), np.zeros(len(u))
    for t in range(len(u)):
        if where is None or where[t]:
            h = step(h) + drive * u[t]
            ys[t] = read(h) + d * u[t]
    return ys, h


def difference(function, x, direction, eps=1e-5):
    """Derivative of a function along a direction, by central differences of fourth order."""
    at = lambda k: function(x + k * eps * direction)  # noqa: E731
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * eps)
