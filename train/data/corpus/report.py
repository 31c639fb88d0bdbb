"""What went in and out of each stage, by which rule, with examples."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from train.data.corpus.tasks import Phase, Summary

WIDTH = 100  # characters of an example


def write_report(corpus: Path, phases: Sequence[Phase], summaries: Mapping[str, Summary]) -> str:
    """Writes report.json and report.txt; the text of the latter."""
    stages = {name: summary for name, summary in summaries.items() if summary.read}
    values = {name: vars(summary) for name, summary in stages.items()}
    (corpus / "report.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = "\n".join(_lines(stages)) + "\n"
    (corpus / "report.txt").write_text(text, "utf-8")
    return text


def _lines(stages: Mapping[str, Summary]) -> Iterator[str]:
    yield f"{'stage':<18} {'documents':>12} {'kept':>12} {'':>7} {'characters':>16} {'kept':>16}"
    for name, stage in stages.items():
        yield (
            f"{name:<18} {stage.read:>12,} {stage.kept:>12,} {stage.kept / stage.read:>7.1%} "
            f"{stage.characters_read:>16,} {stage.characters_kept:>16,}"
        )
    for name, stage in stages.items():
        if stage.dropped or stage.counts:
            yield f"\n{name}"
        for what, count in stage.counts.most_common():
            yield f"  {count:>12,}  {what}"
        for reason, count in stage.dropped.most_common():
            yield f"  {count:>12,}  dropped: {reason} ({count / stage.read:.1%})"
            yield from (_example(each) for each in stage.examples if each["reason"] == reason)


def _example(example: Mapping[str, str]) -> str:
    text = textwrap.shorten(example["text"], WIDTH, placeholder=" …") or example["text"][:WIDTH]
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    detail = f" ({example['detail']})" if "detail" in example else ""
    return f"                {example['id']}{detail}: {shown}"
