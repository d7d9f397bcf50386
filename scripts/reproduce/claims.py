"""What the papers claim, tested in miniature on 4x4 Sudoku.

    python scripts/reproduce/claims.py                 # all claims, 8 seeds, two runs at a time
    python scripts/reproduce/claims.py vrpo gdpo       # some of them
    python scripts/reproduce/claims.py --explain       # and further runs that look for the reasons
    python scripts/reproduce/claims.py --list

A seed is one shared start (the model of sudoku4_sft.yaml) and everything trained from it; intervals are Student's t
over seeds, 95%. Budgets within a claim are equal: same steps and rollouts, or same forwards. Settings are in
claim_runs.py. Finished runs in --output are not repeated. Writes claims.json and claims.md there.

Verdicts: "reproduced" if the whole interval of every figure lies on the claimed side, "not reproduced" if the whole
interval of one lies on the other side, else "inconclusive".
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import claim_frontier
from claim_figures import Claim, Figure, Results
from claim_measures import MEASURES, measure
from claim_runs import run_all

from dllm_rl.cli.output import write_json


def _accuracy(run: Mapping[str, Any], speed: int) -> float:
    return next(float(e["success"]) for e in run["after"] if e["tokens_per_step"] == speed)


def _column(run: Mapping[str, Any], name: str, first: int = 0) -> list[float]:
    return [row[name] for row in run["metrics"] if name in row and row["step"] > first]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _gap(results: Results, better: str, worse: str, speed: int) -> Figure:
    pairs = zip(results[better], results[worse], strict=True)
    values = [_accuracy(a, speed) - _accuracy(b, speed) for a, b in pairs]
    return Figure(f"{better} - {worse}, boards at {speed} per forward", values, scale=100, unit=" points")


def _log_ratio(results: Results, measure: str, worse: str, better: str) -> Figure:
    values = [math.log10(seed[worse] / seed[better]) for seed in results[measure]]
    return Figure(f"log10 of {worse} over {better}", values)


def _levels(results: Results, names: Sequence[str], speeds: Sequence[int] = (1, 4)) -> list[str]:
    lines = []
    for name in [name for name in names if name in results]:
        cells = [f"{100 * _mean([_accuracy(run, s) for run in results[name]]):.1f} at {s}" for s in speeds]
        lines.append(f"{name}: boards {', '.join(cells)} per forward, %")
    return lines


def _start_levels(results: Results, speeds: Sequence[int] = (1, 4)) -> list[str]:
    cells = [f"{100 * _mean([seed['accuracy'][s] for seed in results['start']]):.1f} at {s}" for s in speeds]
    return [f"start: boards {', '.join(cells)} per forward, %"]


def _variances(results: Results, measure: str) -> list[str]:
    names = results[measure][0]
    return [", ".join(f"{n}: {_mean([seed[n] for seed in results[measure]]):.3g}" for n in names)]


def _igpo(results: Results) -> list[Figure]:
    pairs = list(zip(results["igpo"], results["grpo, hard"], strict=True))

    def groups(run: Mapping[str, Any]) -> float:
        mixed = [row.get("guided/all_wrong_groups", row["all_wrong_groups"]) for row in run["metrics"] if "loss" in row]
        return _mean(mixed)

    name = "eval/4_per_step/success"
    learned = [_mean(_column(a, name)) - _mean(_column(b, name)) for a, b in pairs]
    return [
        Figure("all-wrong groups, grpo - igpo", [groups(b) - groups(a) for a, b in pairs], scale=100, unit=" points"),
        Figure("boards, mean of 4 evaluations on the way, igpo - grpo", learned, scale=100, unit=" points"),
    ]


def _lightning(results: Results) -> list[Figure]:
    tuned, bare = results["lightning_rl"], results["lightning_rl, no anchor"]
    pairs = list(zip(tuned, [seed["fast"] for seed in results["start"]], strict=True))
    speed = [run["after"][0]["tokens_per_forward"] - 16 / forwards for run, (forwards, _) in pairs]
    kept = [_accuracy(run, 1) - accuracy for run, (_, accuracy) in pairs]
    worth = [_accuracy(a, 1) - _accuracy(b, 1) for a, b in zip(tuned, bare, strict=True)]
    return [
        Figure("tokens per forward, after - before", speed),
        Figure("boards, after - before", kept, above=-0.01, scale=100, unit=" points"),
        Figure("boards, with - without the anchor", worth, scale=100, unit=" points"),
    ]


def _fast(results: Results) -> list[str]:
    points = [seed["fast"] for seed in results["start"]]
    speed, accuracy = _mean([16 / forwards for forwards, _ in points]), _mean([accuracy for _, accuracy in points])
    return [
        f"start: {speed:.2f} tokens per forward, boards {100 * accuracy:.1f} %",
        *(
            f"{name}: {_mean([run['after'][0]['tokens_per_forward'] for run in results[name]]):.2f} tokens per "
            f"forward, boards {100 * _mean([_accuracy(run, 1) for run in results[name]]):.1f} %"
            for name in ("lightning_rl", "lightning_rl, no anchor")
        ),
    ]


def _policy(results: Results) -> list[Figure]:
    def gap(name: str, other: str) -> list[float]:
        found = [claim_frontier.advantage_over(seed, name, other) for seed in results["frontier"]]
        return [value for value in found if value is not None]

    figures = []
    for name, other in (("policy, experts", "threshold"), ("policy, experts", "policy")):
        values = gap(name, other)
        if len(values) > 1:
            figures.append(Figure(f"boards at equal forwards, {name} - {other}", values, scale=100, unit=" points"))
    return figures


def _start_gap(results: Results, name: str, speed: int, above: float) -> Figure:
    pairs = zip(results[name], results["start"], strict=True)
    values = [_accuracy(run, speed) - start["accuracy"][speed] for run, start in pairs]
    label = f"{name}, after - before, boards at {speed} per forward"
    return Figure(label, values, above=above, scale=100, unit=" points")


CLAIMS: Mapping[str, Claim] = {
    "coupled": Claim(
        "Complementary masks lower the estimator's variance at equal forwards",
        "DiffuCoder, arXiv:2506.20639; with counts ESPO, arXiv:2512.03759",
        ["complementary"],
        lambda r: [
            _log_ratio(r, "complementary", "rates, apart", "rates, pair"),
            _log_ratio(r, "complementary", "counts, apart", "counts, pair"),
        ],
        lambda r: _variances(r, "complementary"),
    ),
    "vrpo": Claim(
        "Score variance (8,1) < (4,1) < (2,2) < (1,4) (rates, masks each), unshared worse by orders of magnitude",
        "LLaDA 1.5, arXiv:2505.19223",
        ["preference score"],
        lambda r: [
            _log_ratio(r, "preference score", "(4, 1), shared", "(8, 1), shared"),
            _log_ratio(r, "preference score", "(2, 2), shared", "(4, 1), shared"),
            _log_ratio(r, "preference score", "(1, 4), shared", "(2, 2), shared"),
            Figure(
                "log10 of unshared over shared",
                _log_ratio(r, "preference score", "(4, 1), unshared", "(4, 1), shared").values,
                above=1.0,
            ),
        ],
        lambda r: _variances(r, "preference score"),
    ),
    "gdpo": Claim(
        "Quadrature has lower mean squared error than double Monte Carlo at 2, 3 and 4 forwards",
        "GDPO, arXiv:2510.08554",
        ["quadrature"],
        lambda r: [_log_ratio(r, "quadrature", f"double Monte Carlo {n}", f"quadrature {n}") for n in (2, 3, 4)],
        lambda r: _variances(r, "quadrature"),
    ),
    "igpo": Claim(
        "Hints lower the share of all-wrong groups and speed up learning on hard boards at equal rollouts",
        "IGPO, arXiv:2509.10396",
        ["igpo", "grpo, hard", "start"],
        _igpo,
        lambda r: [
            f"start: boards {100 * _mean([seed['hard'] for seed in r['start']]):.1f} at 4 per forward, %",
            *_levels(r, ["igpo", "grpo, hard", "igpo, tenth of the rate", "igpo, all hint tokens"], (4,)),
        ],
        ["igpo, tenth of the rate", "igpo, all hint tokens"],
    ),
    "lightning": Claim(
        "Tokens per forward rise with at most 1 point of accuracy lost, and the NLL anchor is needed for accuracy",
        "LightningRL, arXiv:2603.13319",
        ["lightning_rl", "lightning_rl, no anchor", "start"],
        _lightning,
        _fast,
    ),
    "policy": Claim(
        "A learned policy beats confidence thresholds when the block is the canvas; expert steering helps there",
        "Learning unmasking policies, arXiv:2512.09106",
        ["policy", "policy, experts", "frontier"],
        _policy,
        lambda r: claim_frontier.figures(r["frontier"]),
    ),
    "sequence": Claim(
        "Sequence-level ELBOs beat the one-step mean field on planning tasks",
        "ESPO, arXiv:2512.03759; GDPO, arXiv:2510.08554",
        ["espo", "gdpo", "diffu_grpo", "start"],
        lambda r: [_gap(r, name, "diffu_grpo", 4) for name in ("espo", "gdpo")],
        lambda r: [
            *_start_levels(r),
            *_levels(r, ["espo", "gdpo", "diffu_grpo", "espo, tenth of the rate", "diffu_grpo, tenth of the rate"]),
        ],
        ["espo, tenth of the rate", "diffu_grpo, tenth of the rate"],
    ),
    "trajectory": Claim(
        "Replaying the trajectory beats random masks when several tokens are decoded per forward",
        "TraceRL, arXiv:2509.06949",
        ["trace_rl", "coupled_grpo", "diffu_grpo", "start"],
        lambda r: [_gap(r, "trace_rl", name, 4) for name in ("coupled_grpo", "diffu_grpo")],
        lambda r: [*_start_levels(r), *_levels(r, ["trace_rl", "coupled_grpo", "diffu_grpo"])],
    ),
    "just_grpo": Claim(
        "Training on left-to-right decoding helps at 1 token per forward and keeps parallel decoding (to 1 point)",
        "JustGRPO, arXiv:2601.15165",
        ["just_grpo", "start"],
        lambda r: [_start_gap(r, "just_grpo", n, above) for n, above in ((1, 0.0), (2, -0.01), (4, -0.01))],
        lambda r: [*_start_levels(r, (1, 2, 4)), *_levels(r, ["just_grpo"], (1, 2, 4))],
    ),
    "spg": Claim(
        "An upper bound for bad rows beside the lower bound for good ones beats the lower bound for all",
        "SPG, arXiv:2510.09541",
        ["spg", "spg, lower bound", "start"],
        lambda r: [_gap(r, "spg", "spg, lower bound", 4)],
        lambda r: [*_start_levels(r), *_levels(r, ["spg", "spg, lower bound"])],
    ),
    "wd1": Claim(
        "Weighted likelihoods without a ratio beat diffu-GRPO on Sudoku",
        "wd1, arXiv:2507.08838",
        ["wd1", "diffu_grpo, gentle", "start"],
        lambda r: [_gap(r, "wd1", "diffu_grpo, gentle", 4)],
        lambda r: [*_start_levels(r), *_levels(r, ["wd1", "diffu_grpo, gentle"])],
    ),
    "consistent": Claim(
        "Training on the states of decoding beats the one-step mean field",
        "CJ-GRPO, arXiv:2509.23924; MDPO, arXiv:2508.13148",
        ["cj_grpo", "mdpo", "diffu_grpo", "start"],
        lambda r: [_gap(r, name, "diffu_grpo", 4) for name in ("cj_grpo", "mdpo")],
        lambda r: [*_start_levels(r), *_levels(r, ["cj_grpo", "mdpo", "diffu_grpo"])],
    ),
    "segments": Claim(
        "More segments of the trajectory, whose likelihood is nearer to its own, teach more",
        "d2 (StepMerge), arXiv:2509.21474",
        ["d2", "d2, 2 segments", "d2, 1 segment", "start"],
        lambda r: [_gap(r, "d2", "d2, 2 segments", 4), _gap(r, "d2, 2 segments", "d2, 1 segment", 4)],
        lambda r: [*_start_levels(r), *_levels(r, ["d2", "d2, 2 segments", "d2, 1 segment"])],
    ),
    "draws": Claim(
        "More draws per likelihood teach more",
        "BGPO, arXiv:2510.11683",
        ["bgpo", "bgpo, 2 draws", "start"],
        lambda r: [_gap(r, "bgpo", "bgpo, 2 draws", 4)],
        lambda r: [*_start_levels(r), *_levels(r, ["bgpo", "bgpo, 2 draws"])],
    ),
    "unigrpo": Claim(
        "A grid of masking rates over the updates of a step beats full masking at each of them",
        "UniGRPO (MMaDA), arXiv:2505.15809",
        ["unigrpo, 4 updates", "diffu_grpo, 4 updates", "start"],
        lambda r: [_gap(r, "unigrpo, 4 updates", "diffu_grpo, 4 updates", 4)],
        lambda r: [*_start_levels(r), *_levels(r, ["unigrpo, 4 updates", "diffu_grpo, 4 updates"])],
    ),
}


def collect(
    names: Sequence[str], output: Path, seeds: Sequence[int], processes: int, explain: bool = False
) -> dict[str, list[Any]]:
    """Everything that the claims need."""
    claims = [CLAIMS[name] for name in names]
    needs = list(dict.fromkeys(need for c in claims for need in [*c.needs, *(c.explain if explain else ())]))
    results = run_all(output, [need for need in needs if need not in MEASURES], seeds, processes)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = {n: [pool.submit(measure, output, n, seed) for seed in seeds] for n in needs if n in MEASURES}
        for name, futures in jobs.items():
            results[name] = [future.result() for future in futures]
            print(f"measured: {name}", flush=True)
    return results


def report(names: Sequence[str], results: Results) -> tuple[list[dict[str, Any]], str]:
    """(rows for JSON, Markdown)."""
    rows, table, details = [], ["| claim | source | measured, mean [95%] | verdict |", "|---|---|---|---|"], []
    for name in names:
        claim = CLAIMS[name]
        figures = claim.figures(results)
        verdicts = {figure.verdict for figure in figures} or {"inconclusive"}
        verdict = next(v for v in ("not reproduced", "inconclusive", "reproduced") if v in verdicts)
        cells = "<br>".join(f"{figure} ({figure.verdict})" for figure in figures)
        table.append(f"| {claim.text} | {claim.source} | {cells} | **{verdict}** |")
        also = claim.also(results)
        details += [f"- `{name}`: {line}" for line in also]
        rows.append(
            {
                "name": name,
                "claim": claim.text,
                "source": claim.source,
                "verdict": verdict,
                "figures": [
                    {
                        "label": f.label,
                        "values": list(f.values),
                        "interval": f.interval,
                        "claimed_above": f.above,
                        "verdict": f.verdict,
                    }
                    for f in figures
                ],
                "also": also,
            }
        )
    return rows, "\n".join([*table, "", "Levels, means over seeds:", "", *details, ""])


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--list", action="store_true", help="print the claims")
    parser.add_argument("--explain", action="store_true", help="add the runs that look for reasons")
    parser.add_argument("--output", type=Path, default=Path("runs/claims"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 18)))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.list:
        for name, claim in CLAIMS.items():
            print(f"{name}: {claim.text} ({claim.source})")
        return
    names = arguments.names or list(CLAIMS)
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        parser.error(f"unknown claim '{unknown[0]}'; there are: {', '.join(CLAIMS)}")
    if len(set(arguments.seeds)) < 2:
        parser.error("an interval needs at least 2 different seeds")
    os.environ["OMP_NUM_THREADS"] = "1"  # runs are side by side
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = collect(names, arguments.output, arguments.seeds, arguments.processes, arguments.explain)
    rows, text = report(names, results)
    seconds = time.perf_counter() - started
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {arguments.processes} processes of one thread"
    about = {"seeds": arguments.seeds, "seconds": seconds, "machine": machine}
    write_json(arguments.output / "claims.json", about | {"claims": rows})
    text = f"Seeds {arguments.seeds}; {seconds / 60:.0f} minutes on {machine}.\n\n{text}"
    (arguments.output / "claims.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
