"""Float64 numpy oracles: a Gaussian mixture and its probability flow, written apart from genjax."""

import json
import pathlib

import numpy as np
from scipy.integrate import solve_ivp

REFERENCES = pathlib.Path(__file__).parents[1] / "references"


def reference(name):
    """A reference file: inputs and expected values."""
    return json.loads((REFERENCES / f"{name}.json").read_text())


class Mixture:
    """A two-dimensional Gaussian mixture by plain matrix inverses."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means = np.array(weights), np.array(means)
        self.covariances = np.array(covariances)

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def covariance(self):
        centred = self.means - self.mean
        of_means = np.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return of_means + np.einsum("k,kij->ij", self.weights, self.covariances)

    def log_prob_and_score(self, x, alpha=1.0, sigma=0.0):
        """Log density and score of alpha x_0 + sigma eps."""
        dims = x.shape[1]
        logs, scores = [], []
        for w, m, c in zip(self.weights, self.means, self.covariances, strict=True):
            c = alpha**2 * c + sigma**2 * np.eye(dims)
            pull = np.linalg.solve(c, (x - alpha * m).T).T
            log_det = np.linalg.slogdet(2 * np.pi * c)[1]
            logs.append(np.log(w) - 0.5 * (((x - alpha * m) * pull).sum(1) + log_det))
            scores.append(-pull)
        logs = np.array(logs)
        log_prob = np.logaddexp.reduce(logs, axis=0)
        resp = np.exp(logs - log_prob)
        return log_prob, np.einsum("kb,kbi->bi", resp, np.array(scores))


def fixture_mixture():
    inputs = reference("gmm_score_denoiser_ve")["inputs"]
    return Mixture(inputs["gmm_weights"], inputs["gmm_means"], inputs["gmm_covs"])


def flow_of_vp(mixture, x, t_start, t_stop, beta_min=0.1, beta_max=20.0):
    """dx/dt = -beta (x + score) / 2 by DOP853 (Song et al. 2021, eq. 13)."""

    def slope(t, flat):
        y = flat.reshape(x.shape)
        beta = beta_min + t * (beta_max - beta_min)
        big = beta_min * t + 0.5 * (beta_max - beta_min) * t**2
        _, score = mixture.log_prob_and_score(y, np.exp(-0.5 * big), np.sqrt(-np.expm1(-big)))
        return (-0.5 * beta * (y + score)).ravel()

    solution = solve_ivp(slope, (t_start, t_stop), x.ravel(), "DOP853", rtol=1e-10, atol=1e-11)
    return solution.y[:, -1].reshape(x.shape)
