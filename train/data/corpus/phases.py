"""A config as phases: which tasks there are, and which read what others left."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from train.data import sources
from train.data.config import PythonStdlib, Text, TokenizerFile
from train.data.corpus import decontaminate, domains, duplicates, language, quality, rules
from train.data.corpus.config import Corpus, Decontaminate, Judged, MinHash
from train.data.corpus.filtering import run_filter
from train.data.corpus.publish import DOCUMENTS_FOLDER, TOKENS_FOLDER, run_publish, run_tokens
from train.data.corpus.read import run_check, run_files, run_read, shard_files
from train.data.corpus.tasks import Input, Phase


def corpus_phases(config: Corpus, report: Callable[[str], None]) -> list[Phase]:
    """The phases of a corpus in order. Looks for the files of its source and of its evaluation sets."""
    phases = _read(config, report)
    shards = phases[0].tasks
    documents = "1-read"  # the phase whose documents the next one reads

    def add(name: str, keep: Callable[..., Any], settings: object, extra: str = "", *, alone: bool = False) -> str:
        run = partial(run_filter, keep=partial(keep, settings=settings), previous=documents)
        phases.append(Phase(name, shards, run, f"{settings} {extra}", (Input(documents),), alone=alone))
        return name

    if config.language:
        documents = add("2-language", language.keep, config.language, _version("py3langid"))
    if config.exact:
        phases += _exact(documents, shards)
        documents = phases[-1].name
    if config.minhash:
        phases += _minhash(documents, shards, config.minhash)
        documents = phases[-1].name
    if config.rules:
        documents = add(
            "5-rules", rules.keep, config.rules, _content(config.rules.c4.bad_words if config.rules.c4 else "")
        )
    if config.quality:
        documents = add("6-quality", quality.keep, config.quality, _content(config.quality.model), alone=True)
    if config.decontaminate:
        documents = add("7-decontaminate", decontaminate.keep, config.decontaminate, _sets(config.decontaminate))
    if config.domains:
        by = config.domains.by
        model = _content(by.model) if isinstance(by, Judged) else ""
        documents = add("8-domains", domains.keep, by, model, alone=isinstance(by, Judged))
    return phases + _publish(config, documents, shards)


def output_of(config: Corpus) -> Path:
    """The folder of a corpus."""
    return Path(config.output).expanduser()


def _read(config: Corpus, report: Callable[[str], None]) -> list[Phase]:
    shards = shard_files(sources.find_files(config.source, report), config.shard_megabytes)
    # The standard library has test files that are not UTF-8 on purpose.
    allowed = 1.0 if isinstance(config.source, PythonStdlib) else config.max_bad_fraction
    field = "" if isinstance(config.source, PythonStdlib) else config.source.field
    how = dict(field=field, fields=config.fields, bad=allowed > 0)
    count = len(shards)
    files, read = partial(run_files, shards=shards), partial(run_read, previous="1-files", **how)
    check = partial(run_check, previous="1-read", tasks=count, max_bad_fraction=allowed)
    return [
        Phase("1-files", count, files, repr(shards), alone=True),
        Phase("1-read", count, read, f"{how} {_version('resiliparse')}", (Input("1-files"),)),
        Phase("1-check", 1, check, f"{allowed}", (Input("1-read", count),)),
    ]


def _exact(documents: str, shards: int) -> list[Phase]:
    """Tables of each shard, what is the first of what over all of them, and the filter."""
    tables, firsts, end = "3-exact-digests", "3-exact-firsts", "3-exact"
    merge = partial(duplicates.run_first_digests, tables=tables, tasks=shards)
    drop = partial(duplicates.run_drop, previous=documents, tables=tables, firsts=firsts)
    return [
        Phase(tables, shards, partial(duplicates.run_digests, previous=documents), "", (Input(documents),)),
        Phase(firsts, 1, merge, "", (Input(tables, shards),)),
        Phase(end, shards, drop, "", (Input(documents), Input(firsts, 1))),
    ]


def _minhash(documents: str, shards: int, settings: MinHash) -> list[Phase]:
    """Likewise, with the pairs of each band between."""
    tables, buckets, firsts, end = "4-minhash-signatures", "4-minhash-buckets", "4-minhash-clusters", "4-minhash"
    sign = partial(duplicates.run_signatures, previous=documents, settings=settings)
    pair = partial(duplicates.run_bucket, tables=tables, tasks=shards, settings=settings)
    merge = partial(duplicates.run_clusters, buckets=buckets, bands=settings.bands, tables=tables, tasks=shards)
    drop = partial(duplicates.run_drop, previous=documents, tables=tables, firsts=firsts)
    return [
        Phase(tables, shards, sign, f"{settings}", (Input(documents),)),
        Phase(buckets, settings.bands, pair, f"{settings}", (Input(tables, shards),)),
        Phase(firsts, 1, merge, "", (Input(tables, shards), Input(buckets, settings.bands))),
        Phase(end, shards, drop, "", (Input(documents), Input(firsts, 1))),
    ]


def _publish(config: Corpus, documents: str, shards: int) -> list[Phase]:
    how = dict(weights=config.domains.weights if config.domains else {}, seed=config.seed)
    run = partial(run_publish, previous=documents, **how)
    name = "9-documents"
    phases = [Phase(name, shards, run, f"{how}", (Input(documents),), folder=DOCUMENTS_FOLDER)]
    if config.tokens:
        run = partial(run_tokens, settings=config.tokens, seed=config.seed)
        tokenizer = config.tokens.tokenizer
        content = _content(tokenizer.path) if isinstance(tokenizer, TokenizerFile) else ""
        shown = f"{config.tokens} {config.seed} {content}"
        inputs = (Input(name, shards),)
        phases.append(Phase("9-tokens", 1, run, shown, inputs, folder=TOKENS_FOLDER, alone=True))
    return phases


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def _content(path: str) -> str:
    """A digest of names and sizes of what a path names; a name on the Hub is none, and stands for itself."""
    if not path or not Path(path).expanduser().exists():
        return ""
    return sources.fingerprint(sources.find_files(Text(path=path), lambda line: None), content=False)


def _sets(settings: Decontaminate) -> str:
    files = [file for found in decontaminate.evaluation_files(settings) for file in found]
    return sources.fingerprint(files, content=True)
