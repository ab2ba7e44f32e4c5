"""Run the study, or make its figures and table.

``python benchmarks/bayesopt run --results FILE [--parts shortlist] [--seeds 10]``
does the runs that FILE does not hold yet; stop it at any time, call it again. One
process to a file; a report takes several.
``python benchmarks/bayesopt report --results FILE`` writes the figures and prints the
table. ``--smoke`` makes everything tiny.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

import torch  # noqa: E402

from bayesopt import report, study  # noqa: E402
from bayesopt.methods import SMOKE, Settings  # noqa: E402
from bayesopt.problems import PROBLEMS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--results", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["shortlist"],
        choices=("shortlist", "others", "thompson", "dense"),
    )
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "report":
        lines = [line for path in options.results for line in study.read(path)]
        report.write(lines, options.figures)
        return
    seeds = range(options.first_seed, options.seeds)
    runs = study.plan(options.parts, seeds, options.problems)
    study.study(options.results[0], runs, SMOKE if options.smoke else Settings())


if __name__ == "__main__":
    main()
