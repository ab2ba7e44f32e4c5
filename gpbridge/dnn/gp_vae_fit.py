"""Training a GP prior VAE: what a step's posterior of the inducing values is made of.

In: a :class:`~gpbridge.dnn.gp_vae.GPPriorVAE` and data with auxiliary inputs. Out: a
trained copy, conditioned on the data. Next: predictions at new auxiliary inputs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Generator, Tensor

from gpbridge.checks import check_choice, check_count, check_positive
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.elbo_training import ELBOFit, ascend_elbo
from gpbridge.dnn.gp_vae import GPPriorVAE
from gpbridge.dnn.training import Callback


def fit_gp_vae(
    model: GPPriorVAE,
    X_aux: Tensor,
    Y: Tensor,
    *,
    epochs: int = 200,
    learning_rate: float = 1e-3,
    prior_learning_rate: float = 1e-2,
    batch_size: int | None = None,
    support: str = "data",
    num_samples: int = 1,
    generator: Generator | None = None,
    resume: dict[str, Any] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> ELBOFit:
    """Train a copy of the model on its lower bound by Adam, and condition it.

    Args:
        model: The model, which stays as it is.
        X_aux: Auxiliary inputs ``n x a``.
        Y: Data ``n x d`` or ``n x input_shape``.
        epochs: Passes over the data, after those of ``resume``.
        learning_rate: Of encoder and decoder.
        prior_learning_rate: Of kernel, embedding, inducing points and likelihood, which
            are few numbers on scales of their own.
        batch_size: Rows per step; None takes all.
        support: What q(u) is made of in each step: ``"data"``, all of them, which costs
            a pass of the encoder over all and l N m^2, and has unbiased gradients; or
            ``"batch"``, as Jazbec et al., l b m^2 and biased.
        num_samples: Latent draws per datum and step.
        generator: Source of all randomness; None is a fresh one with seed 0.
        resume: The ``state`` of a fit before, of the same data and a model built alike,
            to go on from, as for :func:`~gpbridge.dnn.fit_vae`.
        progress: Whether to show a bar, if there is a terminal.
        callback: Called after every epoch with (epoch, model in eval mode, entries of
            the history); True ends training. Its model is not conditioned.

    Returns:
        The trained model, conditioned on these data, and the state to resume from.

    Raises:
        DivergedError: If the bound or a weight becomes NaN or infinite; its
            ``last_good`` is the fit at the last good epoch.
        InputDataError: If there are no data, or NaN among them.

    Warns:
        RuntimeWarning: If the keyboard interrupts: the last good epoch is returned.
    """  # noqa: DOC502
    model._check(X_aux, Y)
    check_choice("support", support, ("data", "batch"))
    check_count(num_samples=num_samples)
    check_positive(prior_learning_rate=prior_learning_rate)
    own, n = copy.deepcopy(model), len(Y)
    own.log_prob(Y[:2], own.encode(Y[:2]).mean)  # shapes, before any training
    own._covariances(X_aux[:2])

    def elbo(rows: Tensor, generator: Generator) -> Tensor:
        source = rows if support == "batch" else slice(None)
        cross, variance = own._covariances(X_aux[source])
        sites = own._sites(Y[source])
        q = own._conditioned(cross, sites, n)
        if support == "data":
            cross, variance = cross[..., rows], variance[..., rows]
            sites = sites[0][:, rows], sites[1][:, rows]
        noise = (num_samples, generator)
        return own._elbo(q, cross, variance, sites, Y[rows], n, *noise)

    networks = [*own.encoder.parameters(), *own.decoder.parameters()]
    shared = {id(p) for p in networks}
    others = [p for p in own.parameters() if id(p) not in shared]
    try:
        fit = ascend_elbo(
            own,
            elbo,
            (Y, X_aux),
            groups=[(networks, learning_rate), (others, prior_learning_rate)],
            epochs=epochs,
            batch_size=n if batch_size is None else batch_size,
            generator=generator,
            resume=resume,
            progress=progress,
            callback=callback,
            name="fit_gp_vae",
            usual_rate=1e-3,
        )
    except DivergedError as error:
        if error.last_good.history["elbo"]:
            own.condition(X_aux, Y)
        raise
    own.condition(X_aux, Y)
    return fit
