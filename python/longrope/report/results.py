"""The report's first half: what came out."""

from __future__ import annotations

from html import escape

from .files import OURS, Report
from .markup import as_number, as_perplexity, card, figure, table


def headline(report: Report, title: str) -> str:
    """Say what came out, in two sentences and a row of numbers."""
    parts = [f"<h1>{escape(title)}</h1>"]
    heldout, search = report.heldout, report.search
    if report.measured and search is None and heldout is None:
        parts.append('<p class="lead">What was measured, on texts that no search has read.</p>')
        return "\n".join(parts)
    parts.append(
        '<p class="lead">Rescale factors of the rotary embedding, searched on some documents and proved on others. '
        "The weights are untouched.</p>"
    )
    if heldout is None or OURS not in heldout["methods"]:
        return "\n".join(parts)
    methods = heldout["methods"]
    low, high = heldout["original_length"], heldout["target_length"]
    rivals = {name: methods[name] for name in ("pi", "ntk", "yarn")}
    best = min(rivals, key=lambda name: rivals[name]["nll"])
    ours, difference = methods[OURS], heldout["differences"][best]
    original, rival = methods["original"], rivals[best]
    verdict = (
        f"On held-out documents, over positions {low:,} to {high:,}, the extended model reads at perplexity "
        f"<b>{as_number(ours['perplexity'])}</b>; the original is at {as_number(original['perplexity'])}, and "
        f"{rival['title']}, the best of PI, NTK and YaRN, at {as_number(rival['perplexity'])}."
    )
    sure = "better" if difference["high"] < 0 else "worse" if difference["low"] > 0 else "not told apart"
    against = (
        f"Against {rivals[best]['title']} the loss differs by {difference['mean']:+.4f} nats per token "
        f"(95% interval {difference['low']:+.4f} to {difference['high']:+.4f}: {sure})."
    )
    who = ""
    if search is not None:
        origin = escape(search["winner"]["origin"])
        if search["winner_is_a_seed"]:
            who = f"<p>The winner of the search <b>is a seed</b> ({origin}): nothing found was better.</p>"
        else:
            who = f"<p>The winner of the search <b>was found</b> by it ({origin}); it is not a seed.</p>"
    parts.append(f'<div class="verdict"><p>{verdict}</p><p>{against}</p>{who}</div>')
    cards = [
        card(method["title"], as_number(method["perplexity"]), "ours" if name == OURS else "")
        for name, method in methods.items()
    ]
    caption = f"Held-out perplexity, positions {low:,} to {high:,}"
    parts.append(f'<p class="lead" style="font-size:14px">{caption}</p><div class="cards">{"".join(cards)}</div>')
    return "\n".join(parts)


def perplexity(report: Report, drawn: dict[str, str]) -> str:
    heldout = report.heldout
    if heldout is None:
        return ""
    parts = ["<h2>Perplexity by position</h2>"]
    parts.append(
        figure(
            drawn.get("perplexity_by_position"),
            f"One forward of {heldout['target_length']:,} tokens per document and method, "
            f"{len(heldout['windows'])} documents, means over {heldout['bucket_tokens']:,} tokens. All scaled methods "
            "run "
            "under their long regime here, also at positions below the original length.",
        )
    )
    first = next(iter(heldout["methods"].values()))
    head = ["method", *(f"{b['first']:,}-{b['last']:,}" for b in first["by_position"]), "beyond training"]
    rows = []
    for name, method in heldout["methods"].items():
        cells = [as_perplexity(bucket["nll"]) for bucket in method["by_position"]]
        rows.append((name == OURS, [method["title"], *cells, as_number(method["perplexity"])]))
    parts.append(table(head, rows))

    lengths = [entry["length"] for entry in first["by_length"]]
    if lengths:
        head = ["perplexity of a text of", *(f"{length:,}" for length in lengths)]
        rows = [
            (name == OURS, [method["title"], *(as_perplexity(entry["nll"]) for entry in method["by_length"])])
            for name, method in heldout["methods"].items()
        ]
        parts.append(table(head, rows))
    documents = [entry["window"] for entry in first["by_document"]]
    if len(documents) > 1:
        head = ["beyond training, by document", *documents]
        rows = [
            (name == OURS, [method["title"], *(as_perplexity(entry["nll"]) for entry in method["by_document"])])
            for name, method in heldout["methods"].items()
        ]
        parts.append(table(head, rows))
    return "\n".join(parts)


def intervals(report: Report) -> str:
    """Differences with bootstrap intervals, drawn to one scale."""
    heldout = report.heldout
    if heldout is None or "differences" not in heldout:
        return ""
    differences = heldout["differences"]
    near = [d for d in differences.values() if abs(d["mean"]) < 1.0] or list(differences.values())
    reach = max(max(abs(d["low"]), abs(d["high"])) for d in near) or 1.0
    rows = []
    for name, d in differences.items():
        left, right = (max(-reach, min(reach, d[end])) for end in ("low", "high"))
        start, stop = 50 + 50 * left / reach, 50 + 50 * right / reach
        width = max(stop - start, 0.6)
        bar = f'<div class="bar"><u style="left:50%"></u><i style="left:{start:.2f}%;width:{width:.2f}%"></i></div>'
        rows.append(
            f"<tr><td>ours - {escape(heldout['methods'][name]['title'])}</td><td>{d['mean']:+.4f}</td>"
            f"<td>{d['low']:+.4f}</td><td>{d['high']:+.4f}</td><td>{d['perplexity_ratio']:.4f}</td><td>{bar}</td></tr>"
        )
    any_one = next(iter(differences.values()))
    return (
        "<h2>Differences in loss, with intervals</h2>"
        f"<p>Nats per token over positions {heldout['original_length']:,} to {heldout['target_length']:,}; below "
        "zero, ours "
        f"is better. Paired bootstrap: {any_one['blocks']} contiguous blocks of {any_one['block_tokens']} tokens from "
        f"{any_one['documents']} documents, both methods resampled together, 10,000 times, 95% percentile interval. "
        "The "
        "interval speaks of these documents; others may differ more.</p>"
        '<div class="scroll"><table><thead><tr><th></th><th>mean</th><th>low</th><th>high</th><th>perplexity ratio</th>'
        f"<th>better ← 0 → worse</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def short_text(report: Report) -> str:
    heldout = report.heldout
    if heldout is None or "short_equals_original" not in heldout:
        return ""
    methods = heldout["methods"]
    same = heldout["short_equals_original"]
    verdict = (
        '<span class="good">equal to the original model\'s, bit for bit</span>'
        if same
        else '<span class="bad">not equal to the original model\'s</span>'
    )
    rows = []
    for name in ("original", OURS):
        short = methods[name]["short"]
        rows.append((name == OURS, [methods[name]["title"], *(as_perplexity(e["nll"]) for e in short["by_length"])]))
    head = ["perplexity of a text of", *(f"{e['length']:,}" for e in methods[OURS]["short"]["by_length"])]
    return (
        f"<h2>Short texts</h2><p>Texts of up to {heldout['original_length']:,} tokens go through the short regime, "
        "whose "
        f"factors are those of training. Scored in forwards of their own, their losses are {verdict}.</p>"
        + table(head, rows)
    )


def passkeys(report: Report) -> str:
    heldout = report.heldout
    if heldout is None or "passkey" not in heldout:
        return ""
    found = heldout["passkey"]
    depths = [row["depth"] for row in next(iter(found.values()))]
    rows = [
        (
            name == OURS,
            [heldout["methods"][name]["title"], *("found" if row["retrieved"] else "-" for row in results)],
        )
        for name, results in found.items()
    ]
    return (
        f"<h2>Passkey retrieval</h2><p>A number hidden at a depth of {heldout['target_length']:,} tokens of filler "
        "and asked "
        "for at the end; found where every token of the answer is the likeliest.</p>"
        + table(["depth", *(f"{depth:.0%}" for depth in depths)], rows)
    )
