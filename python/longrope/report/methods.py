"""The report's second half: how it came about, and how to repeat it."""

from __future__ import annotations

import shlex
from html import escape
from typing import Any

from ..progress import clock
from .files import Report, screen_text
from .markup import figure, table


def factor_section(report: Report, drawn: dict[str, str]) -> str:
    search = report.search
    if search is None:
        return ""
    winner = search["winner"]["candidate"]
    listed = ", ".join(f"{value:g}" for value in (round(v, 4) for v in winner["factors"]))
    return (
        "<h2>The factors</h2>"
        + figure(
            drawn.get("factors"),
            "A factor of 2 makes a pair turn half as fast. Seeds at attention factor 1 beside the winner.",
        )
        + critical_text(report)
        + f"<p>n-hat {winner['start_tokens']}, attention factor {winner['attention_factor']:g}. As JSON with "
        "provenance: <code>factors/winner.json</code>.</p>"
        f"<details><summary>all {len(winner['factors'])} factors</summary><pre>{listed}</pre></details>"
    )


def critical_text(report: Report) -> str:
    """Say where the search put the critical pair, where it chose one."""
    search, inspection = report.search, report.inspection
    found = None if search is None else search["winner"]["candidate"].get("critical_pair")
    if found is None or inspection is None:
        return ""
    return (
        f"<p>Critical pair found: {found}; the theoretical one is {inspection['critical_pair']}. Below it the factors "
        "are NTK's, with the base that gives it the whole extension; from there on each pair has its own.</p>"
    )


def minimised(search: dict[str, Any]) -> str:
    """Say what the search minimised."""
    if search.get("objective", "text") == "needle":
        return (
            "the loss of answers at the end of the search documents, each about a sentence near their start "
            "(LongRoPE2's needles)"
        )
    return f"mean loss over positions {search['score_from']:,} to {search['target_length']:,} of the search documents"


def allowed(space: dict[str, Any]) -> str:
    """Say which factors the search could choose."""
    grid = f"[{space['lower']:g}, {space['upper']:g}] in steps of {space['step']:g}"
    order = "never decreasing" if space["monotone"] else "in any order"
    if space.get("kind", "all") == "critical":
        pairs = space["critical_pairs"]
        return f"Critical pair from {pairs[0]} to {pairs[-1]}, factors from it on in {grid}, {order}, NTK below"
    return f"Factors in {grid}, {order}"


def readjusted_section(report: Report) -> str:
    """One row for each length that was readjusted."""
    if report.readjusted is None:
        return ""
    rows = []
    for one in report.readjusted["lengths"]:
        losses = [f"{one[side][name]:.4f}" for side in ("search", "heldout") for name in one[side]]
        gains = [f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" for d in one["differences"].values()]
        rows.append((False, [f"{one['length']:,}", *losses, *gains, one["origin"], f"{one['largest_factor']:g}"]))
    kinds = ("original", "extended", "readjusted")
    head = ["length", *(f"{side}, {kind}" for side in ("search", "held-out") for kind in kinds)]
    head += ["held-out, minus original", "minus extended", "which is", "largest factor"]
    return (
        "<h2>Readjusted for short texts</h2><p>Mean loss from position 0, on the extended model, under the original "
        "factors, the extended ones and those found between them. Both ends are seeds of that search, so it is never "
        "worse than either on the search documents; the held-out ones say what that is worth.</p>" + table(head, rows)
    )


def search_section(report: Report, drawn: dict[str, str]) -> str:
    search = report.search
    if search is None:
        return ""
    settings, space = search["settings"], search["space"]
    difference = search["winner_minus_best_seed"]
    seed = search["best_seed"]
    parts = ["<h2>The search</h2>"]
    parts.append(
        f"<p>{search['evaluations']} evaluations (one is one forward of one document), "
        f"{clock(search['seconds'])} of forwards; ended because {escape(search['stopped'])}. Method: "
        f"{escape(search.get('method', 'LongRoPE'))}. Minimised: {minimised(search)}.</p>"
    )
    if search["winner_is_a_seed"]:
        parts.append(f"<p>The winner is a seed: {escape(seed['origin'])}.</p>")
    else:
        parts.append(
            f"<p>The winner was found. On the search documents its loss is {search['winner']['score']:.4f}, that of "
            "the "
            f"best seed ({escape(seed['origin'][5:])}) {seed['score']:.4f}: {difference['mean']:+.4f} "
            f"[{difference['low']:+.4f}, {difference['high']:+.4f}]. It was chosen for that, so only the held-out "
            "documents "
            "count.</p>"
        )
    parts.append(figure(drawn.get("search"), "Candidates in the order in which the target length scored them."))
    if drawn.get("screens"):
        parts.append(
            figure(
                drawn["screens"],
                "Screens only rank children; all search documents at the target length decide. What a screen "
                "turned down has no score there, controls apart, so the agreement is measured among what it let pass.",
            )
        )
    for screen in search["screens"]:
        found = screen["agreement"]
        dropped = screen["dropped_after_pairs"]
        parts.append(
            f"<p>Screen at {screen_text(screen)}: Kendall's tau {found['tau']:.2f}, Spearman's rho "
            f"{found['rho']:.2f} "
            f"over {found['pairs']} candidates; its favourite is number {found['favourite_rank']} at the target."
            + (f" Dropped after {dropped} candidates: its ranks did not agree." if dropped else "")
            + "</p>"
        )
    parts.append(
        f"<p>Population {settings['population']}, up to {settings['iterations']} iterations of {settings['mutations']} "
        f"mutations and {settings['crossovers']} crossovers of the best {settings['parents']}, mutation probability "
        f"{settings['mutation_probability']:g}, seed {settings['seed']}. {allowed(space)}; "
        f"n-hat in {escape(str(space['start_tokens']))}.</p>"
    )
    return "\n".join(parts)


def inspection_section(report: Report, drawn: dict[str, str]) -> str:
    inspection = report.inspection
    if inspection is None:
        return ""
    rows = [
        (
            False,
            [
                str(pair["pair"]),
                f"{pair['wavelength_tokens']:,.1f}",
                f"{pair['periods_in_training']:,.3f}",
                "" if pair["periods_at_target"] is None else f"{pair['periods_at_target']:,.3f}",
            ],
        )
        for pair in inspection["pairs"]
    ]
    pairs = table(["pair", "wavelength, tokens", "turns in training", "turns at the target"], rows)
    return (
        f"<h2>What the model saw in training</h2><p>{len(inspection['pairs'])} rotary pairs, theta "
        f"{inspection['theta']:,.0f}. From pair {inspection['critical_pair']} on (the theoretical critical dimension) "
        "a pair "
        f"turns less than once in {inspection['original_length']:,} tokens, so beyond them it shows angles the model "
        "has "
        "never seen.</p>"
        + figure(drawn.get("wavelengths"), "Red: less than one turn.")
        + f"<details><summary>all pairs</summary>{pairs}</details>"
    )


def export_section(report: Report) -> str:
    export = report.export
    if export is None:
        return ""
    check = export["reload"]
    rows = [
        (
            False,
            [
                f"{one['start']:,}-{one['length']:,}",
                f"{one['ours_nll']:.5f}",
                f"{one['stock_nll']:.5f}",
                f"{one['difference']:.5f}",
                "yes" if one["passed"] else "NO",
            ],
        )
        for one in check["checks"]
    ]
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in export["notes"])
    same = "equal bit for bit to" if check["short_equals_stock_original"] else "not equal to"
    return (
        f"<h2>The export, reloaded without this package</h2><p><code>{escape(export['folder'])}</code> was loaded by "
        "stock "
        f"transformers {escape(check['transformers'])} in a process that cannot import this project. In its short "
        "regime it "
        f"is {same} the original model there.</p>"
        + table(["positions", "loss, ours", "loss, stock", "difference", f"within {check['tolerance']:g}"], rows)
        + "<p>The two sides round at other places (fused attention beside SDPA, exact angles beside float32 ones), "
        "hence a tolerance.</p>" + notes
    )


def documents_section(report: Report) -> str:
    if report.documents is None:
        return ""
    rows = []
    for side, name in (("search", "search"), ("heldout", "held-out")):
        for window in report.documents[side]:
            rows.append(
                f"<tr><td>{name}</td><td>{escape(window['document'])}</td><td>{window['document_tokens']:,}</td>"
                f"<td>{window['offset']:,}</td><td>{window['length']:,}</td><td "
                f"class=wrap><code>{window['sha256']}</code>"
                "</td></tr>"
            )
    return (
        "<h2>Documents</h2><p>Nothing the search read is evaluated on.</p>"
        '<div class="scroll"><table><thead><tr><th>side</th><th>document</th><th>tokens</th><th>from</th><th>read</th>'
        f"<th>sha256 of the text</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def repeat_section(report: Report) -> str:
    run = report.run
    rows = [(False, [name, str(value)]) for name, value in run["settings"].items()]
    rows += [(False, [f"budget: {name}", str(value)]) for name, value in run.get("budget", {}).items()]
    rows += [(False, [f"version: {name}", str(value)]) for name, value in run["versions"].items()]
    command = run.get("command") or shlex.join(
        ["longrope", "extend", str(run["settings"]["model"]), "--to", str(run["settings"]["to"])]
    )
    return (
        f"<h2>Again</h2><pre>{escape(command)}</pre><p>The same command in another run directory repeats it; in this "
        "one it "
        "goes on where it stopped. <code>evaluations.jsonl</code> has every score, with the losses of every block of "
        "tokens.</p><details><summary>all settings and versions</summary>" + table(["", ""], rows) + "</details>"
    )
