"""Dense float64 forms of kernels and deep Gaussian processes, retyped from the papers.

Nothing here imports gpbridge.
"""

import itertools
import math

import torch
from torch.distributions import MultivariateNormal, kl_divergence


def squared_exponential(x, z, lengthscale):
    """exp(-|x - z|^2 / (2 l^2)), for two points."""
    return torch.exp(-0.5 * ((x - z) / lengthscale).square().sum())


def double_orbit_sum(base, orbit1, orbit2, weights):
    """sum_{a,a'} w_a w_a' k(x_a, x'_a'), point by point, orbits ``n x s x d``."""
    K = torch.zeros(len(orbit1), len(orbit2), dtype=torch.float64)
    for i, j in itertools.product(range(len(orbit1)), range(len(orbit2))):
        for a, b in itertools.product(range(len(weights)), range(len(weights))):
            K[i, j] += weights[a] * weights[b] * base(orbit1[i, a], orbit2[j, b])
    return K


def rotated(x, angle):
    """A point of the plane turned by an angle."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack([c * x[0] - s * x[1], s * x[0] + c * x[1]])


def smoothed_squared_exponential(x, z, lengthscale, noise_variance):
    """E k(x + e, z + e') for independent normal e, e' of variance v in each column.

    A squared exponential of l'^2 = l^2 + 2 v, times (l / l')^d.
    """
    wide = (lengthscale**2 + 2 * noise_variance) ** 0.5
    shrink = (lengthscale / wide) ** len(x)
    return shrink * squared_exponential(x, z, wide)


def convolutional_kernel(images1, images2, patch_shape, weights, lengthscale):
    """P^-2 sum_{p,p'} w_p w_p' k(x[p], x'[p']) by loops; images ``n x c x h x w``."""
    h, w = patch_shape

    def patches(image):
        rows = range(image.shape[-2] - h + 1)
        columns = range(image.shape[-1] - w + 1)
        return [
            image[:, r : r + h, c : c + w].flatten()
            for r, c in itertools.product(rows, columns)
        ]

    K = torch.zeros(len(images1), len(images2), dtype=torch.float64)
    for i, j in itertools.product(range(len(images1)), range(len(images2))):
        mine, theirs = patches(images1[i]), patches(images2[j])
        for (p, x), (q, z) in itertools.product(enumerate(mine), enumerate(theirs)):
            value = squared_exponential(x, z, lengthscale)
            K[i, j] += weights[p] * weights[q] * value
    return K / len(weights) ** 2


def squared_exponential_gram(X, Z, lengthscale, variance=1.0):
    """The kernel ``n x m`` of rows; Rasmussen and Williams 2006, eq. (4.9)."""
    difference = (X[..., :, None, :] - Z[..., None, :, :]) / lengthscale
    return variance * torch.exp(-0.5 * difference.square().sum(-1))


def sparse_posterior(Kuu, Kuf, Kff, mean, covariance):
    """Mean and covariance of f given q(u); Hensman et al., AISTATS 2015, eq. (6)."""
    projection = torch.linalg.solve(Kuu, Kuf).mT
    change = projection @ (Kuu - covariance) @ projection.mT
    return projection @ mean, Kff - change


def sparse_bound(Kuu, Kuf, Kff, mean, covariance, y, noise):
    """The bound of all data in nats; Hensman et al., UAI 2013, eq. (4)."""
    f, V = sparse_posterior(Kuu, Kuf, Kff, mean, covariance)
    normal = torch.distributions.Normal(f, noise**0.5)
    fit = normal.log_prob(y).sum() - V.diagonal().sum() / (2 * noise)
    q = MultivariateNormal(mean, covariance)
    return fit - kl_divergence(q, MultivariateNormal(torch.zeros_like(mean), Kuu))


def sparse_layer_values(X, Z, lengthscale, variance, jitter, m, L, noise):
    """Joint draws ``s x n x h`` of a sparse layer at inputs ``s x n x d``.

    Given whitened means ``h x M``, factors ``h x M x M`` and normals ``s x n x h``.
    Dense and one output at a time; the layer's mean is not in it.
    """
    Kuu = squared_exponential_gram(Z, Z, lengthscale, variance)
    Kuu = Kuu + jitter * variance * torch.eye(len(Z), dtype=Z.dtype)
    Kuf = squared_exponential_gram(Z.expand(len(X), -1, -1), X, lengthscale, variance)
    Kff = squared_exponential_gram(X, X, lengthscale, variance)
    C = torch.linalg.cholesky(Kuu)
    parts = []
    for o in range(len(m)):
        mean, V = sparse_posterior(Kuu, Kuf, Kff, C @ m[o], C @ L[o] @ L[o].mT @ C.mT)
        values, vectors = torch.linalg.eigh(V)
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        parts.append(mean + (root @ noise[..., o, None])[..., 0])
    return torch.stack(parts, -1)


def dual_by_quadrature(phi, k, q1, q2, num_nodes=601):
    """E phi(u) phi(v) of one correlated pair, by the trapezoidal rule in the plane."""
    nodes = torch.linspace(-12, 12, num_nodes, dtype=torch.float64)
    weights = torch.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
    weights = weights * (nodes[1] - nodes[0])
    u = math.sqrt(q1) * nodes[:, None]
    v = k / math.sqrt(q1) * nodes[:, None] + math.sqrt(q2 - k**2 / q1) * nodes
    return float((weights[:, None] * weights * phi(u) * phi(v)).sum())


def arc_cosine(k, q1, q2):
    """F and its derivative for ReLU, of numbers; Cho and Saul 2009."""
    t = math.acos(max(-1.0, min(1.0, k / math.sqrt(q1 * q2))))
    s = math.sqrt(max(q1 * q2 - k * k, 0.0))
    return (s + (math.pi - t) * k) / (2 * math.pi), (math.pi - t) / (2 * math.pi)


def relu_convolution_by_loops(images1, images2, steps, sigma, weight, bias):
    """Covariances of all pairs of pixels of a ReLU network, pixel by pixel.

    ``steps``: a list of "conv" (3 x 3, zeros around), "relu" and "pool" (2 x 2);
    ``sigma(q, q')`` is the covariance of taps. Returns k and theta as dictionaries
    from (pixel of x, pixel of x') for the pairs x x', x x and x' x'.
    """
    pairs = {"12": (images1, images2), "11": (images1,) * 2, "22": (images2,) * 2}
    channels, height, width = images1.shape
    pixels = list(itertools.product(range(height), range(width)))
    k = {
        name: {
            (p, q): float((a[:, p[0], p[1]] * b[:, q[0], q[1]]).sum()) / channels
            for p in pixels
            for q in pixels
        }
        for name, (a, b) in pairs.items()
    }
    theta = {name: dict.fromkeys(k[name], 0.0) for name in pairs}
    taps = list(itertools.product((-1, 0, 1), repeat=2))
    for step in steps:
        if step == "relu":
            new_k, new_theta = {}, {}
            for name in pairs:
                first, second = name[0] * 2, name[1] * 2
                values = {
                    (p, q): arc_cosine(c, k[first][p, p], k[second][q, q])
                    for (p, q), c in k[name].items()
                }
                new_k[name] = {pq: v[0] for pq, v in values.items()}
                new_theta[name] = {
                    pq: v[1] * theta[name][pq] for pq, v in values.items()
                }
            k, theta = new_k, new_theta
            continue
        if step == "pool":
            height, width = height // 2, width // 2
            pixels = list(itertools.product(range(height), range(width)))
            window = list(itertools.product((0, 1), repeat=2))

            def value(table, p, q, window=window):
                return (
                    sum(
                        table[
                            (2 * p[0] + a[0], 2 * p[1] + a[1]),
                            (2 * q[0] + b[0], 2 * q[1] + b[1]),
                        ]
                        for a in window
                        for b in window
                    )
                    / len(window) ** 2
                )

            k, theta = (
                {
                    name: {(p, q): value(t[name], p, q) for p in pixels for q in pixels}
                    for name in pairs
                }
                for t in (k, theta)
            )
            continue

        def filtered(table, p, q):
            total = 0.0
            for a in taps:
                for b in taps:
                    key = (p[0] + a[0], p[1] + a[1]), (q[0] + b[0], q[1] + b[1])
                    if key in table:
                        total += sigma(a, b) * table[key]
            return total / len(taps)

        new_k, new_theta = {}, {}
        for name in pairs:
            both = {pq: k[name][pq] + theta[name][pq] for pq in k[name]}
            new_k[name] = {pq: weight * filtered(k[name], *pq) + bias for pq in k[name]}
            new_theta[name] = {pq: weight * filtered(both, *pq) + bias for pq in both}
        k, theta = new_k, new_theta
    return k["12"], theta["12"]


class FiniteNetwork:
    """A random network of finite width in tangent parameterisation.

    Steps: ("dense", weight variance, bias variance), ("conv", f, weight variance, bias
    variance[, square root of the covariance of taps]), ("residual", steps), ("pool",
    f), ("global",), ("flatten",), ("norm",), or an activation. Weights are standard
    normal, drawn in the first pass and kept in ``weights``.
    """

    def __init__(self, steps, width, num_outputs, generator):
        self.steps, self.width, self.num_outputs = steps, width, num_outputs
        self.generator, self.weights = generator, []

    def __call__(self, x):
        return self._run(self.steps, x, last=True)

    def _draw(self, *shape):
        weight = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        self.weights.append(weight.requires_grad_())
        return weight

    def _run(self, steps, h, last=False):
        for i, step in enumerate(steps):
            name = step if callable(step) else step[0]
            width = self.width
            if last and i == len(steps) - 1:
                width = self.num_outputs
            if callable(name):
                h = name(h)
            elif name == "dense":
                _, weight, bias = step
                h = h @ self._draw(h.shape[-1], width) * (weight / h.shape[-1]) ** 0.5
                h = h + bias**0.5 * self._draw(width)
            elif name == "conv":
                f, weight, bias, *root = step[1:]
                filters = self._draw(width, h.shape[1], f, f)
                if root:
                    filters = torch.einsum("oiyx,ay,bx->oiab", filters, *root * 2)
                scale = (weight / (h.shape[1] * f * f)) ** 0.5
                h = torch.nn.functional.conv2d(h, filters * scale, padding=f // 2)
                h = h + bias**0.5 * self._draw(width)[:, None, None]
            elif name == "residual":
                h = h + self._run(step[1], h)
            elif name == "pool":
                h = torch.nn.functional.avg_pool2d(h, step[1])
            elif name == "global":
                h = h.mean((-2, -1))
            elif name == "flatten":
                h = h.flatten(1)
            elif name == "norm":
                mean, var = h.mean(1, keepdim=True), h.var(1, keepdim=True)
                h = (h - mean) / var.sqrt()
        return h


def monte_carlo_kernels(steps, x, width, num_networks, generator, outputs=64):
    """Means and standard errors of both kernels over finite networks.

    Returns:
        (mean, error) of E f f', and (mean, error) of the Gram matrix of gradients.
    """
    covariances, tangents = [], []
    outputs = min(outputs, width)
    for _ in range(num_networks):
        with torch.no_grad():
            f = FiniteNetwork(steps, width, outputs, generator)(x)
        covariances.append(f @ f.T / outputs)
        network = FiniteNetwork(steps, width, 1, generator)
        f = network(x)[:, 0]
        rows = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(y, network.weights, retain_graph=True)
                ]
            )
            for y in f
        ]
        J = torch.stack(rows)
        tangents.append(J @ J.T)
    found = []
    for draws in (covariances, tangents):
        draws = torch.stack(draws)
        found.append((draws.mean(0), draws.std(0) / num_networks**0.5))
    return found


def whitened_sparse_posterior(K_uu, K_uf, K_ff, mean, covariance, jitter):
    """Whitened sparse posterior of a zero mean GP (Hensman et al. 2015), dense."""
    identity = torch.eye(len(K_uu), dtype=K_uu.dtype)
    L = torch.linalg.cholesky(K_uu + jitter * K_uu.diagonal().mean() * identity)
    A = torch.linalg.solve(L, K_uf)
    return A.T @ mean, K_ff + A.T @ (covariance - identity) @ A


def averaged_sparse_posterior(k, Z, orbits, weights, mean, covariance, jitter):
    """The posterior of g at all orbit points, ``n x s x d``, then averaged."""
    n, s, _ = orbits.shape
    flat = orbits.reshape(n * s, -1)
    average = torch.kron(torch.eye(n, dtype=Z.dtype), weights[None] / s)  # n x n s
    K = k(Z, Z), k(Z, flat), k(flat, flat)
    m, S = whitened_sparse_posterior(*K, mean, covariance, jitter)
    return average @ m, average @ S @ average.T


def polya_gamma_bound(f, sign, c):
    """Jaakkola and Jordan (2000): below log sigma(sign f) for any c > 0."""
    curvature = math.tanh(c / 2) / (4 * c)
    sigma = 1 / (1 + math.exp(-c))
    return math.log(sigma) + (sign * f - c) / 2 - curvature * (f**2 - c**2)


def rotated_evidence(X, y, angle, num_samples, lengthscale, outputscale, noise):
    """Log evidence of y with zero mean and an RBF kernel averaged over rotations.

    Angles are midpoints of equal cells of [-angle, angle]; every pair of elements of
    two orbits counts. van der Wilk et al. 2018, eq. (8).
    """
    angles = [angle * ((2 * j + 1) / num_samples - 1) for j in range(num_samples)]

    def turned(x, a):
        c, s = math.cos(a), math.sin(a)
        return (c * float(x[0]) - s * float(x[1]), s * float(x[0]) + c * float(x[1]))

    n = len(X)
    K = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for a in angles:
                for b in angles:
                    (p, q), (r, t) = turned(X[i], a), turned(X[j], b)
                    square = ((p - r) ** 2 + (q - t) ** 2) / lengthscale**2
                    K[i, j] += math.exp(-square / 2) / num_samples**2
    C = outputscale * K + noise * torch.eye(n, dtype=torch.float64)
    misfit = y @ torch.linalg.solve(C, y)
    return -0.5 * (misfit + torch.linalg.slogdet(C)[1] + n * math.log(2 * math.pi))
