"""Table of what a better prior wins on new data: the interval of each run, and what priors refitted to its codes won.

    python tests/soak/measure_new_data.py OUT.csv RUN... [--root runs] [--rows 10000]
    python tests/soak/measure_new_data.py OUT.csv          (prints OUT.csv as the Markdown table of README.md)

A run of `pvae refit` is measured on the same test rows as the run that it froze. Values are nats per datum of the test
split. A run that has a row is not measured again.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas

from pvae import Run
from pvae.analysis import gain, surgery
from pvae.util.seeds import subset

ENDS = ("gain", "gain_upper", "information", "information_upper")


def measured(run: Run, root: str, rows: int) -> dict[str, object]:
    """Return the row of a run: KL, empirical figures and interval; of a refit, the gain over the run that it froze."""
    test, train = run.data.test.x, run.data.train.x
    test = test[subset(len(test), rows, 0)]
    parent = run.files.manifest["parent"]
    row: dict[str, object] = {
        "run": run.name, "id": run.path.name, "data": run.data.source, "fingerprint": run.data.fingerprint[:16],
        "epochs": run.status["epoch"], "fit_seconds": run.status["seconds"],
        "parent": None, "prior": run.experiment.latents["z"].prior.kind, "n": len(test),
    }  # fmt: skip
    if parent is not None:
        won = gain(Run.load(parent["run"], root=root).pair, run.pair, test).gained
        return row | {"parent": parent["run"], "gained": won.value, "gained_error": won.standard_error}
    found = surgery(run.pair, test, train=train, population="full")
    for name in ("elbo", "kl", "mutual_information", "marginal_kl", "log_n"):
        row[name] = getattr(found, name).value
    if (new := found.population) is None:
        return row
    for name in ENDS:
        figure = getattr(new, name)
        row |= {} if figure is None else {f"new_{name}": figure.value, f"new_{name}_error": figure.standard_error}
    return row | {"seen": new.seen, "largest": new.largest, "slope": new.slope, "new_prior": new.prior}


def page(frame: pandas.DataFrame) -> str:
    """Return the Markdown table: a row per run with its interval, and what each refit of it won, the largest first."""
    lines = [
        "| run | KL | I_q | log n | marginal KL, these rows | new data, at least | at most | priors refitted won |"
    ]
    lines.append("|---" * 8 + "|")
    for _, run in frame[frame["parent"].isna()].iterrows():
        refits = frame[frame["parent"] == f"{run['run']}/{run['id']}"].sort_values("gained", ascending=False)
        won = [
            f"{r['run'].removeprefix(run['run'] + '_')} {r['gained']:.2f} ± {r['gained_error']:.2f}"
            for _, r in refits.iterrows()
        ]
        plain = [f"{run[name]:.2f}" for name in ("kl", "mutual_information", "log_n", "marginal_kl")]
        known = [name for name in ENDS[:2] if pandas.notna(run.get(f"new_{name}"))]
        ends = [f"{run[f'new_{name}']:.2f} ± {run[f'new_{name}_error']:.2f}" for name in known] + [""] * (
            2 - len(known)
        )
        lines.append(f"| {' | '.join([run['run'], *plain, *ends, ', '.join(won)])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the runs that have no row in the table yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--rows", type=int, default=10_000)
    asked = parser.parse_args()
    rows: list[Any] = pandas.read_csv(asked.out).to_dict("records") if asked.out.exists() else []
    for name in asked.runs:
        run = Run.load(name, root=asked.root)
        if not any(row["id"] == run.path.name for row in rows):
            rows.append(measured(run, asked.root, asked.rows))
            pandas.DataFrame(rows).round(4).to_csv(asked.out, index=False)
    print(page(pandas.DataFrame(rows)))


if __name__ == "__main__":
    main()
