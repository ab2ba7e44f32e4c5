"""Which surrogate should choose the next experiment? A paired study.

``problems`` are what is maximised, ``methods`` how a surrogate is fitted and the next
experiments are chosen, ``study`` runs all pairs and can be interrupted, ``report``
makes figures and tables. ``python benchmarks/bayesopt --help`` says how.

Ten seeds; all methods of a seed start from the same Sobol design of 2 (d + 1) points,
at least 10 and at most 30. Budgets are such that one seed of the shortlist on all
problems takes about 40 minutes of a slow core: an iteration with 60 experiments takes
0.7 seconds with ``SingleTaskGP``, 0.7 linearised, 2.5 with Matérn and tangent kernel,
1.5 with a deep kernel and 0.6 with an ensemble in 6 dimensions, two to three times that
in 200; hence 30 to 40 single experiments in up to 25 dimensions (20 with two outcomes)
and 12 batches of 4 above.
"""
