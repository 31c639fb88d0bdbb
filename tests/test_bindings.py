"""Config text: what it binds, where each mistake is said to be, and that rendered text reads back."""

from __future__ import annotations

import dataclasses
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.bindings import MAX_BYTES, parse_set, read, render, resolve
from qwen_jax.errors import ConfigError, FileError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    peak_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    version: Literal[1, 2] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    peak_lr: float = 0.02
    steps: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    query: int
    kv: int = 1

    def __post_init__(self) -> None:
        if self.query % self.kv:
            raise ConfigError(f"query={self.query} must be a multiple of kv={self.kv}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    heads: Heads
    windows: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Empty:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    seed: int
    name: str | None = None
    fast: bool = False
    rate: float | int = 0
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    nested: tuple[tuple[str, int], ...] = ()
    model: Model
    optim: AdamW | Muon = AdamW(peak_lr=0.5, betas=(0.1, 0.2))
    teacher: Model | None = None
    logger: Empty | Muon | None = None

    def __post_init__(self) -> None:
        if self.seed > self.model.heads.query * 100:
            raise ValueError(f"model.heads.query={self.model.heads.query} is too few for seed={self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loose:
    a: Any = None
    b: Muon | Empty | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    runs: tuple[Heads, ...] = ()
    last: Muon | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    runs: tuple[Heads, ...]


MINIMAL = "seed = 1\nmodel.heads.query = 4\n"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config("text", "--set text", ..., base="text of base.gin") -> what resolve gives for Run."""
    monkeypatch.chdir(tmp_path)  # so that places read `a.gin:1`

    def run(text: str | bytes, *assignments: str, **files: str) -> tuple[Run, dict[str, str]]:
        for name, content in {"a": text, **files}.items():
            Path(f"{name}.gin").write_bytes(content if isinstance(content, bytes) else content.encode())
        return resolve(Run, read(Path("a.gin")) + parse_set(assignments))

    return run


def refused(config, where: str, words: str, text: str | bytes, *assignments: str, **files: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        config(text, *assignments, **files)
    assert str(caught.value).startswith(f"{where}: ")
    assert "\n" not in str(caught.value)


# What is bound.


def test_values_of_every_kind(config):
    got, where = config(
        'seed = 0x10  # a comment\nname = "a # b"\nfast = True\nrate = 3\nmix = {"a": 1, "b": .5}\n'
        "nested = [('x', 1)]\r\nmodel.heads.query = 4\nmodel.windows = (0, 4)\noptim.peak_lr = 1"
    )
    assert got == Run(
        seed=16,
        name="a # b",
        fast=True,
        rate=3,
        mix={"a": 1.0, "b": 0.5},
        nested=(("x", 1),),
        model=Model(heads=Heads(query=4), windows=(0, 4)),
        optim=AdamW(peak_lr=1.0, betas=(0.1, 0.2)),
    )
    assert type(got.optim.peak_lr) is float and type(got.rate) is int and type(got.mix["a"]) is float
    assert where["model.windows"] == "a.gin:8"
    assert "model.dtype" not in where


def test_a_value_goes_on_while_a_bracket_is_open(config):
    got, where = config(MINIMAL + "model.windows = (0,  # ) not the end\n\n  4,\n)\nname = '('\nfast = True")
    assert got.model.windows == (0, 4) and got.name == "(" and got.fast
    assert (where["model.windows"], where["fast"]) == ("a.gin:3", "a.gin:8")


def test_later_layers_override_earlier_ones(config):
    text = 'include "base.gin"\nseed = 2\nname = "own"'
    got, where = config(text, "seed=3", base=MINIMAL + "fast = True")
    assert (got.seed, got.name, got.fast) == (3, "own", True)
    assert (where["seed"], where["name"], where["fast"]) == ("--set seed=3", "a.gin:3", "base.gin:3")


def test_include_is_relative_to_the_file_that_includes(config, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.gin").write_text("fast = True")
    (tmp_path / "sub" / "b.gin").write_text("include 'c.gin'\n" + MINIMAL)
    assert config('include "sub/b.gin"')[0].fast


def test_macros_are_filled_in_last(config):
    got, where = config('include "base.gin"\nN = 5', base="N = 1\nseed = %N\nmodel.heads.query = %N")
    assert (got.seed, got.model.heads.query) == (5, 5)
    assert where["seed"] == "base.gin:2: %N of a.gin:2"
    assert config("N = 1\nseed = %N\nmodel.heads.query = 2", "N=7")[0].seed == 7


def test_another_class_forgets_the_fields_of_the_old_one_and_the_same_class_keeps_them(config):
    base = MINIMAL + "optim = @AdamW\noptim.peak_lr = 3.0"
    assert config('include "base.gin"\noptim = @AdamW', base=base)[0].optim.peak_lr == 3.0
    assert config('include "base.gin"\noptim = @Muon', base=base)[0].optim == Muon()
    back = config('include "base.gin"\noptim = @Muon', "optim=@AdamW", base=base)[0].optim
    assert back == AdamW(peak_lr=0.5, betas=(0.1, 0.2))  # the field's default again, not base.gin's 3.0


def test_without_a_choice_fields_belong_to_the_class_of_the_default(config):
    assert config(MINIMAL + "optim.peak_lr = 3.0")[0].optim == AdamW(peak_lr=3.0, betas=(0.1, 0.2))
    kept = config('include "base.gin"\noptim = @AdamW', base=MINIMAL + "optim.peak_lr = 3.0")[0]
    assert kept.optim.peak_lr == 3.0
    gone = config('include "base.gin"\noptim = @Muon', base=MINIMAL + "optim.peak_lr = 3.0")[0]
    assert gone.optim.peak_lr == 0.02


def test_order_within_a_file_or_a_command_line_has_no_meaning(config):
    assert config(MINIMAL + "optim.steps = 3\noptim = @Muon")[0].optim == Muon(steps=3)
    assert config(MINIMAL, "optim.steps=3", "optim=@Muon")[0].optim == Muon(steps=3)


def test_an_optional_section_opens_by_itself_and_closes_with_none(config):
    base = MINIMAL + "teacher.heads.query = 2"
    assert config(base)[0].teacher == Model(heads=Heads(query=2))
    assert config(base, "teacher=None")[0].teacher is None
    assert config(MINIMAL, "logger=@Empty")[0].logger == Empty()


def test_a_byte_order_mark_is_no_text(config):
    assert config(b"\xef\xbb\xbf" + MINIMAL.encode())[0].seed == 1


# What is refused, and where the message says it is.


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sede = 2", "Run has no field sede; did you mean seed?"),
        ("model.head.kv = 2", "model (Model) has no field head; did you mean heads?"),
        ("model.heads.kw = 2", "model.heads (Heads) has no field kw"),
        ("optim.steps = 3", "optim (AdamW) has no field steps"),
        ("fast = 1", "fast must be bool, got 1"),
        ("name = 3", "name must be str or None, got 3"),
        ("rate = True", "rate must be float or int, got True"),
        ("rate = 1e400", "rate must be float or int, got inf"),
        ("rate = nan", "rate = nan is not a literal"),
        ("mix = {'a': 1e999}", "mix must be dict[str, float]"),
        ("mix = {1: 1}", "mix must be dict[str, float]"),
        ("mix = {[]: 1}", "is not a literal"),
        ("model.windows = (1, 2.5)", "model.windows must be tuple[int, ...]"),
        ("model.windows = (4)", "model.windows must be tuple[int, ...], got 4"),
        ("optim.betas = (1, 2, 3)", "optim.betas must be tuple[float, float]"),
        ("model.dtype = 'float16'", "model.dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ("optim = @Adam", "optim cannot be @Adam; did you mean @AdamW?"),
        ("optim = @", "optim cannot be @"),
        ("optim = AdamW", "optim = AdamW is not a literal"),
        ("optim = 3", "optim must be @AdamW or @Muon, got 3"),
        ("name = @Muon", "name cannot be @Muon; it is str or None"),
        ("fast.x = 1", "fast is bool, not a section"),
        ("logger.steps = 1", "first write `logger = @Empty` or `logger = @Muon`"),
        ("name = foo", 'name = foo is not a literal: a number, "text"'),
        ('name = "foo', "is not a literal"),
        ("name = 1)", "is not a literal"),
        ("model.windows = (1, 2]", "is not a literal"),
        ("name = 'a' 3", "is not a literal"),
        ("name", "expected `path = value`"),
        ("name =", "expected `path = value`"),
        ("name == 3", "expected `path = value`"),
        ("import os", "expected `path = value`"),
        ("include base.gin", "expected `path = value`"),
        ("fast = %ON", "no macro %ON"),
        ("X = @Muon", "X = @Muon is not a literal"),
        ("SEEDS = 3", "nothing uses the macro %SEEDS"),
        ("include 'b.gin'", "include comes before the first binding"),
        ("model.heads.query = 3", "model.heads.query is already bound at a.gin:2"),
    ],
)
def test_a_mistake_is_said_with_its_line(config, line, words):
    refused(config, "a.gin:3", words, MINIMAL + line)


def test_a_doubtful_escape_is_refused_where_python_only_warns(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(config, "a.gin:3", "is not a literal", MINIMAL + "name = 'C:\\data'")


def test_true_is_not_the_number_one(config):
    refused(config, "a.gin:3", "optim.version must be 1 or 2, got True", MINIMAL + "optim.version = True")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("sede=2", "did you mean seed?"),
        ("fast=1", "must be bool"),
        ("name=foo", "in a shell"),
        ("fast", "expected path=value"),
        ("=3", "expected path=value"),
        ("include 'b.gin'", "expected path=value"),
        ("optim=@Adam", "did you mean @AdamW?"),
    ],
)
def test_a_mistake_on_the_command_line_is_said_with_the_option(config, assignment, words):
    refused(config, f"--set {assignment}", words, MINIMAL, assignment)


@pytest.mark.parametrize(
    "value",
    ["__import__('os')", "@os.system", "@os", "%os.environ", "os.system('x')", "(lambda: 1)()"],
)
def test_nothing_is_imported_or_called(config, monkeypatch, value):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("called"))
    refused(config, "a.gin:3", value[:5], MINIMAL + f"name = {value}")
    refused(config, "a.gin:3", value[:5], MINIMAL + f"optim = {value}")


def test_a_missing_value_names_the_field_its_section_and_how_to_write_it(config):
    refused(config, "a.gin:1", "Run has fields without a value; write `seed = ...` (int)", "model.heads.query = 4")
    refused(config, "a.gin:1", "model.heads (Heads) has fields without a value; write `model.heads.query", "seed = 1")
    refused(config, "a.gin:3", "teacher.heads (Heads) has", MINIMAL + "teacher.dtype = 'float32'")
    with pytest.raises(ConfigError, match=r"AdamW has fields without a value; write `peak_lr = \.\.\.` \(float\)"):
        resolve(AdamW, [])


def test_a_complaint_of_the_dataclass_is_said_with_the_line_of_the_field(config):
    text = "seed = 1\nmodel.heads.kv = 3\nmodel.heads.query = 4"
    refused(config, "a.gin:3", "model.heads (Heads): query=4 must be a multiple of kv=3", text)
    refused(config, "--set model.heads.query=5", "query=5 must be", text, "model.heads.query=5")
    refused(config, "a.gin:2", "Run: model.heads.query=4 is too few", MINIMAL + "model.dtype = 'bfloat16'", "seed=401")


def test_a_wrong_value_is_refused_even_where_a_later_one_overrides_it(config):
    refused(config, "base.gin:3", "fast must be bool", 'include "base.gin"\nfast = True', base=MINIMAL + "fast = 1")


def test_a_wrong_macro_is_said_where_it_is_used_and_where_it_is_written(config):
    text = "seed = 1\nN = 2.5\nmodel.heads.query = %N"
    refused(config, "a.gin:3", "%N of a.gin:2: model.heads.query must be int, got 2.5", text)
    refused(config, "a.gin:2", "nothing uses the macro %M; did you mean MM?", "MM = 1\nM = 1\nseed = %MM\n")


def test_a_section_that_was_closed_must_be_chosen_again(config):
    text = "teacher = None\nteacher.heads.query = 3"
    refused(config, "a.gin:4", "first write `teacher = @Model`", MINIMAL + text)


def test_includes_that_fail(config):
    refused(config, "a.gin:2", "cannot read 'gone.gin'", "# first\ninclude 'gone.gin'\n" + MINIMAL)
    refused(config, "a.gin:1", "Is a directory", "include '.'")
    refused(config, "a.gin:1", "include cycle: a.gin -> a.gin", "include 'a.gin'")
    refused(config, "b.gin:1", "include cycle: a.gin -> b.gin -> a.gin", "include 'b.gin'", b="include './a.gin'")


def test_a_missing_config_is_a_missing_file(tmp_path):
    with pytest.raises(FileError, match=r"gone\.gin"):
        read(tmp_path / "gone.gin")
    with pytest.raises(FileError, match="directory"):
        read(tmp_path)


def test_files_that_are_no_text(config):
    refused(config, "a.gin:3", "not UTF-8", MINIMAL.encode() + b"name = '\xff'\n")
    refused(config, "a.gin:1", "expected", b"\x7fELF\0\0\0")
    refused(config, "a.gin:1", "larger than", b"# " + b"x" * MAX_BYTES)
    refused(config, "a.gin:3", "never closed", MINIMAL + "model.windows = (1,\n2\n")


@pytest.mark.parametrize(
    "value",
    [
        "(" * 9000,
        "(" * 9000 + ")" * 9000,
        "-" * 200_000 + "1",
        "\\'" * 200_000,
        '\\"' * 200_000,
        "'\"" * 200_000,
        "0x" + "f" * 9000,
    ],
    ids=["open", "deep", "signs", "escaped", "escaped2", "quotes", "digits"],
)
def test_a_hostile_value_is_refused_at_once(config, value):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        config(MINIMAL + "name = " + value)
    assert str(caught.value).startswith("a.gin:3: ") and len(str(caught.value)) < 400
    assert time.monotonic() - start < 5


# Text that reads back.

words = st.text(alphabet="a'\"\\#%@[( \n\r\0\u2028é\ud800", max_size=4)
numbers = st.floats(allow_nan=False, allow_infinity=False)
adamw = st.builds(AdamW, peak_lr=numbers, betas=st.tuples(numbers, numbers))
muon = st.builds(Muon, peak_lr=numbers, steps=st.none() | st.integers())
models = st.builds(
    Model,
    heads=st.builds(Heads, query=st.integers(min_value=0), kv=st.just(1)),
    windows=st.lists(st.integers(), max_size=2).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
runs = st.builds(
    Run,
    seed=st.integers(max_value=0),
    name=st.none() | words,
    fast=st.booleans(),
    rate=st.integers(-5, 5) | numbers,
    mix=st.dictionaries(words, numbers, max_size=1),
    nested=st.lists(st.tuples(words, st.integers()), max_size=1).map(tuple),
    model=models,
    optim=adamw | muon,
    teacher=st.none() | models,
    logger=st.none() | muon | st.just(Empty()),
)


@settings(max_examples=40, deadline=None)
@given(run=runs, where=st.sampled_from([None, "a.gin:1", "--set name='\na = 1", "x\r#\u2028(y"]))
def test_rendered_text_reads_back_to_an_equal_config(tmp_path_factory, run, where):
    file = tmp_path_factory.getbasetemp() / "rendered.gin"
    provenance = None if where is None else dict.fromkeys(("seed", "optim", "model.heads.query"), where)
    file.write_text(render(run, provenance), encoding="utf-8", newline="")
    assert resolve(Run, read(file))[0] == run


def several(*assignments: str) -> Several:
    return resolve(Several, parse_set(assignments))[0]


def test_sections_of_a_tuple_are_numbered_from_one(tmp_path):
    made = several("runs.2.query=6", "runs.1.query=4", "runs.1.kv=2", "last.steps=1")
    assert made == Several(runs=(Heads(query=4, kv=2), Heads(query=6)), last=Muon(steps=1))
    (tmp_path / "again.gin").write_text(render(made))
    lines = read(tmp_path / "again.gin")
    assert resolve(Several, lines)[0] == made
    assert resolve(Several, [*lines, *parse_set(["runs.2.query=8"])])[0].runs[1].query == 8
    assert resolve(Several, [*lines, *parse_set(["runs=()"])])[0].runs == ()


def test_a_tuple_of_sections_may_have_no_default():
    assert resolve(Wanted, parse_set(["runs.1.query=4"]))[0].runs == (Heads(query=4),)
    with pytest.raises(ConfigError, match=re.escape("write `runs = ...` (() or numbered sections)")):
        resolve(Wanted, [])


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("runs.3.query=4", "runs.3 without runs.1: sections are numbered from 1, without gaps"),
        ("runs.0.query=4", "the sections of runs are runs.1, runs.2 and so on, not runs.0.query"),
        ("runs.query=4", "the sections of runs are runs.1, runs.2 and so on, not runs.query"),
        ("runs=(4,)", "runs must be () or numbered sections, got (4,)"),
        ("runs.1=4", "runs.1 must be @Heads, got 4"),
        ("runs.1.heads=4", "runs.1 (Heads) has no field heads; there is query, kv"),
        ("runs.1.kv=4", "runs.1 (Heads) has fields without a value; write `runs.1.query = ...` (int)"),
    ],
)
def test_a_mistake_in_a_numbered_section(assignment, words):
    with pytest.raises(ConfigError, match=re.escape(f"--set {assignment}: {words}")):
        several(assignment)


def test_rendered_text_says_where_each_value_came_from(config):
    got, where = config(
        'include "base.gin"\noptim = @Muon\nQ = 4\nmodel.heads.query = %Q', "fast=True", base="seed = 1"
    )
    assert render(got, where) == (
        "seed = 1                 # base.gin:1\n"
        "name = None              # default\n"
        "fast = True              # --set fast=True\n"
        "rate = 0                 # default\n"
        "mix = {}                 # default\n"
        "nested = ()              # default\n"
        "teacher = None           # default\n"
        "logger = None            # default\n"
        "\n"
        "model.windows = ()       # default\n"
        "model.dtype = 'float32'  # default\n"
        "\n"
        "model.heads.query = 4    # a.gin:4: %Q of a.gin:3\n"
        "model.heads.kv = 1       # default\n"
        "\n"
        "optim = @Muon            # a.gin:2\n"
        "optim.peak_lr = 0.02     # default\n"
        "optim.steps = None       # default\n"
    )
    assert render(got).splitlines() == [line.partition("  #")[0].rstrip() for line in render(got, where).splitlines()]


def test_one_long_value_does_not_push_the_comments_out(config):
    got, where = config(MINIMAL + f"model.windows = {tuple(range(80))}")
    lines = [line for line in render(got, where).splitlines() if line]
    columns = {line.index("  # ") for line in lines if "windows" not in line}
    assert max(columns) < 60


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab.=%@#'\"\\()[]{}, \n\t1e-NT", max_size=60) | st.binary(max_size=40))
def test_any_text_is_read_or_refused_with_its_place(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.gin"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        resolve(Loose, read(file))
    except ConfigError as error:
        assert re.match(rf"{re.escape(str(file))}:\d+: ", str(error))
