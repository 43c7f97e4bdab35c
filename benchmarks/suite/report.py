"""What the suite found, for people: tables in Markdown, and the short one that is printed last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.suite.demands import demands
from benchmarks.suite.record import best_of

Results = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns also line up as text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = [("-" * (width - 1) + ":") if i else "-" * width for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def _number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


# Of what there was no time for, so many are named in the tables' notes.
_MOST = 20


def _family(section: str) -> str:
    """Sections of one family have rows of one kind: "attention" and "attention_masks"."""
    return section.partition("_")[0]


def markdown(results: Results) -> str:
    parts = ["# GPU suite", _environment(results), "## In short", summary(results)]
    for name, section in results["sections"].items():
        parts += [f"## {name}", *_TABLES[_family(name)](section["rows"])]
        notes = [f"- FAILED {what}: {why}" for what, why in section["failures"].items()]
        notes += [f"- could not run: {what}: {why}" for what, why in section["errors"].items()]
        notes += [f"- no time left for {what}" for what in section["omitted"][:_MOST]]
        if len(section["omitted"]) > _MOST:
            notes.append(f"- and for {len(section['omitted']) - _MOST} more, which the JSON names")
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _environment(results: Results) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in results["environment"].items())


def summary(results: Results) -> str:
    """The essence of every section that ran."""
    sections = results["sections"]
    families: dict[str, list[dict[str, Any]]] = {}
    for name, section in sections.items():
        families.setdefault(_family(name), []).extend(section["rows"])
    lines = [] if results["options"]["quick"] else [_demands_table(families, sections)]
    lines += [line for family, rows in families.items() if family in _SUMMARIES
              for line in _SUMMARIES[family](rows)]  # fmt: skip
    for name, section in sections.items():
        failed, errors, omitted = (len(section[kind]) for kind in ("failures", "errors", "omitted"))
        counts = f"{failed} FAILED, {omitted} had no time, {errors} could not run"
        if name == "correctness":
            lines.append(f"correctness: {section['done']} of {section['total']} checks done, {counts}")
        elif failed or errors or omitted:
            lines.append(f"{name}: {counts}")
        lines += [f"  FAILED {what}: {why}" for what, why in list(section["failures"].items())[:10]]
        lines += [f"  stopped at its time limit: {job}" for job in section["stopped"]]
    return "\n".join(["```", *lines, "```"])


def _demands_table(families: dict[str, list[dict[str, Any]]], sections: dict[str, Any]) -> str:
    cells = []
    for one in demands(families, sections):
        wanted = f"{'at least' if one.least else 'at most'} {one.wanted}{one.unit}"
        cells.append([one.what, wanted, _number(one.measured, 2, one.unit), one.answer, one.note])
    return table(["demand", "wanted", "measured", "met", ""], cells)


def _peer(row: dict[str, Any]) -> str:
    known = row["timed"] + len(row["untimed"])
    some = f"{row['timed']} of {known}" if row["untimed"] else f"{known}"
    return f"{row['best_peer']} (best of {some})"


def _attention_summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in best_of(rows):
        ours, peer = row["times"][row["ours"]], row["times"][row["best_peer"]]
        cells.append([f"{row['label']} {row['mask']}", row["phase"], row["ours"], _number(ours["ms"], 3),
                      _number(ours["tflops"], 0), _number(ours["percent"], 0, " %"), _peer(row),
                      _number(peer["ms"], 3), _number(row["ratio"], 2, "x")])  # fmt: skip
    head = ["attention", "phase", "ours", "ms", "TFLOP/s", "ceiling", "best peer", "ms", "faster"]
    return [table(head, cells)] if cells else []


def _adaln_summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for row in best_of(rows):
        peer = row["times"][row["best_peer"]]
        for name, ours in row["times"].items():
            if name.startswith("ours"):
                cells.append([row["label"], row["phase"], name, _number(ours["ms"], 4),
                              _number(ours.get("gbs"), 0), _number(ours.get("percent"), 0, " %"), _peer(row),
                              _number(peer["ms"], 4), _number(peer["ms"] / ours["ms"], 2, "x")])  # fmt: skip
    head = ["adaLN", "phase", "ours", "ms", "GB/s", "ceiling", "best peer", "ms", "faster"]
    return [table(head, cells)] if cells else []


def _training_summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        [f"{row['side']}{', torch.compile' if row['compiled'] else ''}", str(row["batch"]),
         _number(row["ms"]), _number(row["samples_per_second"]), _number(row["tflops"], 0),
         _number(row["utilisation"], 0, " %"), _number(row["peak_gb"]), _against(row, rows)]
        for row in rows
    ]  # fmt: skip
    head = ["training step", "batch", "ms", "samples/s", "TFLOP/s", "ceiling", "GB", "faster"]
    return [table(head, cells)] if cells else []


def _against(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Ours against the baseline at the same batch and compilation, in samples per second."""
    same = [other for other in rows if other["side"] == "baseline" and row["side"] == "ours"
            and all(other[key] == row[key] for key in ("batch", "compiled"))]  # fmt: skip
    return _number(row["samples_per_second"] / same[0]["samples_per_second"], 2, "x") if same else ""


def _sampling_summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        [f"batch {row['batch']}, {row['kind']}", *(_number(ms, 2) for ms in row["ms"].values()),
         " / ".join(f"{percent:+.2f} %" for percent in row["overhead_percent"]),
         _number(row["flops_percent"], 3, " %")]
        for row in rows
    ]  # fmt: skip
    head = ["4-step sampling", "N=0 ms", "N=6 ms", "history, twice", "of operations"]
    return [table(head, cells)] if cells else []


def _ceilings_summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    return ["ceilings: " + ", ".join(f"{row['name']} {row['value']:.0f} {row['unit']}" for row in rows)]


def _correctness_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The worst of each operator and dtype, in epsilons."""
    worst: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "rms" in row:
            words = row["case"].split()
            worst.setdefault((row["backend"], words[0], words[-1]), []).append(row)
    cells = [
        [" ".join(key), str(len(group)), _number(max(max(row["rms"]) for row in group), 2),
         _number(max(max(row["largest"]) for row in group), 1)]
        for key, group in worst.items()
    ]  # fmt: skip
    head = ["backend, operator, dtypes", "cases", "largest rms error, eps", "largest error, eps"]
    return [table(head, cells)] if cells else []


def _times_table(rows: Sequence[dict[str, Any]], rate: str, unit: str) -> list[str]:
    parts = []
    for row in rows:
        parts.append(f"### {row['label']} {row.get('mask', '')} {row['phase']}")
        fastest_first = sorted(row["times"].items(), key=lambda item: item[1]["ms"])
        ours = row["times"][row["ours"]]["ms"] if row["ours"] else None
        cells = [
            [name, _number(time["ms"], 4), _number(time["host_ms"], 4),
             _number(100 * time["spread"], 1, " %"), _number(time.get(rate), 0),
             _number(time.get("percent"), 1, " %"), _number(time["ms"] / ours if ours else None, 2, "x")]
            for name, time in fastest_first
        ]  # fmt: skip
        head = ["method", "ms", "host ms", "spread", unit, "of ceiling", "time / ours"]
        parts.append(table(head, cells))
        if row["missing"]:
            parts.append(f"Not timed here: {', '.join(row['missing'])}.")
    return parts


_TABLES = {
    "correctness": _correctness_table,
    "ceilings": _ceilings_summary,
    "attention": lambda rows: _times_table(rows, "tflops", "TFLOP/s"),
    "adaln": lambda rows: _times_table(rows, "gbs", "GB/s"),
    "training": _training_summary,
    "sampling": _sampling_summary,
}
_SUMMARIES = {
    "ceilings": _ceilings_summary,
    "attention": _attention_summary,
    "adaln": _adaln_summary,
    "training": _training_summary,
    "sampling": _sampling_summary,
}
