"""What README says of the ranking and of the costs beside their own pages: worked out from the files that lie here.

python docs/results/methods/told.py > docs/results/methods/told.txt
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

from eqvae.evidence.intervals import mean_difference

HERE = Path(__file__).parent
RUINED = "detok"


def against(values: dict[str, np.ndarray], base: str) -> None:
    """Print each one's difference from a base, paired seed by seed."""
    for name, own in values.items():
        if name != base:
            found = mean_difference(values[base], own, paired=True)
            print(f"  {name}: {found.difference:+.2f} ({found.interval.low:+.2f} to {found.interval.high:+.2f})")


def read(name: str) -> dict:
    """Read a file beside this one."""
    return json.loads((HERE / name).read_text())


ranked = {row["autoencoder"]: row for row in read("ranking.json")["ranking"]}
values = {name: np.array(row["values"]) for name, row in ranked.items()}
print("ranking, against none:")
against(values, "none")

spread = np.sqrt(np.mean([(own - values["plain"]).var(ddof=1) for name, own in values.items()
                          if name not in ("plain", RUINED)]))  # fmt: skip
print(f"standard deviation of paired differences from plain, pooled without {RUINED}: {spread:.2f}")
for count in (3, 4, 8, 25):
    print(f"  {count} seeds reach {stats.t.ppf(0.975, count - 1) * spread / np.sqrt(count):.2f} to each side")

kept = [row for name, row in ranked.items() if name != RUINED]
print(f"Spearman without {RUINED}:")
for measure in kept[0]["predictors"]:
    pairs = [(row["predictors"][measure], row["distance"]) for row in kept]
    print(f"  {measure}: {stats.spearmanr(*zip(*pairs, strict=True)).statistic:+.2f}")

curves = read("curves.json")
print(f"mean over seeds after {', '.join(map(str, curves['steps']))} steps:")
for name, seeds in curves["distances"].items():
    print(f"  {name}: {', '.join(f'{each:.1f}' for each in np.mean(seeds, axis=0))}")

rows = {row["label"]: row["figures"] for row in read("cost.json")["rows"]}
print("cost, against none:")
against({label: np.array(figures["gfid"]["values"]) for label, figures in rows.items()}, "none")
first, last = (rows[label]["rotation"]["here"] for label in ("none", "all weights"))
whole_sec = rows["all weights"]["sec"]["here"]
print("share of the fall in the rotation error, and of the time, of all weights:")
for label, figures in rows.items():
    if label != "none":
        share = (first - figures["rotation"]["here"]) / (first - last)
        print(f"  {label}: {share:.0%} in {figures['sec']['here'] / whole_sec:.0%}")
