"""One stage from file to file. What a row has come to is kept at once, so that a run goes on where it was killed.

Beside OUTPUT stand, while it is made, `OUTPUT.progress` with the outcome of each row, and afterwards
`OUTPUT.report.json`, which says what the output was made of: nothing else is taken for it, or overwritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import DataError, FileError
from qwen_jax.resumable import ResumableFile
from train.data.manifest import to_disk
from train.data.synthesis import config as schema
from train.data.synthesis.asking import Asker, Opened, open_for
from train.data.synthesis.config import Synthesis
from train.data.synthesis.drive import drive
from train.data.synthesis.evolve import EvolveStage
from train.data.synthesis.input import Input
from train.data.synthesis.progress import Report
from train.data.synthesis.repurpose import RepurposeStage
from train.data.synthesis.respond import RespondStage
from train.data.synthesis.select import SelectStage
from train.data.synthesis.stages import Outcome, Stage
from train.data.synthesis.tag import TagStage
from train.data.synthesis.verify_code import VerifyCodeStage
from train.data.synthesis.verify_instructions import VerifyInstructionsStage
from train.data.synthesis.write_verifiers import WriteVerifiersStage


def run(config: Synthesis, *, overwrite: bool = False) -> int:
    """Does what `config` asks for; the exit code."""
    output = Path(config.output).expanduser()
    stage = _stage(config)
    with Input(Path(config.input).expanduser(), stage.check) as rows:
        opened = open_for(config.model, warn=_warn) if config.model else None
        digest = _digest(config, rows, stage, opened)
        try:
            if not overwrite and _is_done(output, digest):
                print(f"{output} is there already", file=sys.stderr)
                return 0
            for path in (_report(output), output) if overwrite else ():
                path.unlink(missing_ok=True)
            head = lambda number: f'{{"index": {number}, "sample": 0, '.encode()
            with ResumableFile(_progress(output), len(rows), 1, head, digest=digest, overwrite=overwrite) as file:
                _work(config, stage, rows, opened, file)
                _finish(output, stage, file, digest)
            _progress(output).unlink()
        except OSError as error:
            raise FileError(f"cannot write {output}: {error.strerror}") from error
    return 0


def _stage(config: Synthesis) -> Stage:
    match config.stage:
        case schema.Tag() as stage:
            return TagStage(stage)
        case schema.Select() as stage:
            return SelectStage(stage)
        case schema.Evolve() as stage:
            return EvolveStage(stage, seed=config.seed)
        case schema.Respond() as stage:
            return RespondStage(stage)
        case schema.VerifyCode() as stage:
            return VerifyCodeStage(stage)
        case schema.WriteVerifiers() as stage:
            return WriteVerifiersStage(stage)
        case schema.VerifyInstructions() as stage:
            return VerifyInstructionsStage(stage)
        case schema.Repurpose() as stage:
            return RepurposeStage(stage)


def _work(config: Synthesis, stage: Stage, rows: Input, opened: Opened | None, file: ResumableFile) -> None:
    """Makes the outcomes that the file misses."""
    if not file.missing:
        return
    asker = Asker(opened, opened.load(), seed=config.seed) if opened else None
    sandbox = getattr(config.stage, "sandbox", None)
    total = len(rows)
    with Report(total, done=total - len(file.missing)) as report:

        def done(index: int, outcome: Outcome) -> None:
            # Reasons in an order of their own, whichever came first.
            dropped = dict(sorted(outcome.dropped.items()))
            file.append(index, {"index": index, "sample": 0, "kept": outcome.kept, "dropped": dropped})
            report.done()

        drive(
            ((index, stage.work(rows[index], index)) for index in file.missing),
            asker,
            done,
            tick=lambda: report.show(asker.new_tokens if asker else 0),
            workers=sandbox.workers if sandbox else 1,
            window=2 * config.model.max_rows if config.model else 16,
        )
    if asker:
        rate = asker.new_tokens / max(report.seconds, 1e-9)
        said = f"{asker.prompt_tokens} tokens asked, {asker.new_tokens} answered in {report.seconds:.1f} s"
        print(f"{said}: {rate:.1f} tokens/s", file=sys.stderr)


class _Outcomes(Sequence[Outcome]):
    """The outcomes in a file, which holds all of them."""

    def __init__(self, file: ResumableFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return self._file.total

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._file.read(index)
        return Outcome(kept=row["kept"], dropped=Counter(row["dropped"]))


def _finish(output: Path, stage: Stage, file: ResumableFile, digest: str) -> None:
    """Writes the output and the report, each whole or not at all, and says what is in the report."""
    outcomes = _Outcomes(file)
    dropped: Counter[str] = Counter()
    barren = 0
    for outcome in outcomes:
        dropped += outcome.dropped
        barren += not outcome.kept
    count = _write(output, (_json(row) for row in stage.collect(outcomes)))
    by_number = dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0])))
    facts = {"rows in": len(outcomes), "rows out": count, "rows in without any out": barren, "dropped": by_number}
    facts |= stage.facts
    report = json.dumps({"run": digest, **facts}, ensure_ascii=False, indent=2)
    _write(_report(output), [report.encode() + b"\n"])
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "nothing"
        print(f"{name}: {value}", file=sys.stderr)


def _write(path: Path, lines: Iterable[bytes]) -> int:
    """How many lines there were."""
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    with partial.open("wb") as file:
        for line in lines:
            count += file.write(line) > 0
        to_disk(file)
    os.replace(partial, path)
    return count


def _json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _is_done(output: Path, digest: str) -> bool:
    """Whether the output of this very run is there. DataError if another's is."""
    try:
        made_by = json.loads(_report(output).read_text("utf-8"))["run"]
    except FileNotFoundError:
        made_by = None
    except (ValueError, TypeError, KeyError):
        made_by = ""
    if made_by == digest and output.exists():
        _progress(output).unlink(missing_ok=True)
        return True
    # Without a report, a run that was killed may have written it just before; its progress is still there.
    if output.exists() and (made_by is not None or not _progress(output).exists()):
        raise DataError(f"{output} was made by another run; choose another output, or --overwrite this one")
    return False


def _digest(config: Synthesis, rows: Input, stage: Stage, opened: Opened | None) -> str:
    """Of all that the output depends on."""
    section: dict[str, Any] = {**dataclasses.asdict(config.stage), "stage": type(config.stage).__name__}
    if "sandbox" in section:
        del section["sandbox"]["workers"]
    what = dict(input=rows.digest, seed=config.seed, stage=section, prompts=[prompt.text for prompt in stage.prompts])
    if opened:
        model = dataclasses.asdict(opened.config) | {"path": str(opened.model.path), "max_rows": None}
        what |= dict(model=model, sampling=dataclasses.asdict(opened.sampling))
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _progress(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress")


def _report(output: Path) -> Path:
    return output.with_name(f"{output.name}.report.json")


def _warn(line: str) -> None:
    print(f"train.data.synthesis: warning: {line}", file=sys.stderr)
