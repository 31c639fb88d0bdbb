"""`python -m infer generate`: what comes out, in which form, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infer.generate
import infer.model
from qwen_jax.engine import VerticalSlash, load
from tests.conftest import tiny_config
from tests.infer.conftest import TEMPLATE, save_run, variant

ROOT = Path(__file__).parents[2]
SHORT = ["--max-new-tokens", "9", "--batch-size", "2"]


@pytest.fixture
def command(run_infer, run_folder):
    """Runs `infer generate`, on the run folder unless told otherwise."""
    return lambda *arguments, stdin=b"", model=run_folder: run_infer("generate", model, *arguments, stdin=stdin)


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_prompt_streams_its_completion_alone(command):
    code, out, err = command("--prompt", "low", *SHORT)
    assert code == 0 and len(out) > 1 and out.endswith("\n") and "\033" not in out
    assert err.startswith("9 tokens in")
    assert command("--prompt", "low", *SHORT)[1] == out
    assert command("--prompt", "low", *SHORT, "--seed", 1)[1] != out


def test_every_form_of_output_has_the_same_completions(command, tmp_path):
    prompts = ["low", "newer\nwider", ""]
    asked = [item for prompt in prompts for item in ("--prompt", prompt)]
    code, _, err = command(*asked, "--output", tmp_path / "out.jsonl", *SHORT)
    assert code == 0, err
    written = rows((tmp_path / "out.jsonl").read_text())
    assert [(row["index"], row["sample"], row["prompt"]) for row in written] == [
        (0, 0, "low"), (1, 0, "newer\nwider"), (2, 0, "")
    ]  # fmt: skip
    for row in written:
        assert list(row) == [
            "index", "sample", "prompt", "completion", "finish_reason", "prompt_tokens", "completion_tokens", "seed",
            "run",
        ]  # fmt: skip
        assert row["finish_reason"] in ("stop", "length") and row["seed"] == 0
        assert row["completion_tokens"] == 9 or row["finish_reason"] == "stop"
    assert written[2]["prompt_tokens"] == 1  # an empty prompt starts from <|endoftext|>

    stdin = "".join(json.dumps({"prompt": prompt, "id": 3}) + "\r\n\n" for prompt in prompts).encode()
    code, out, _ = command("--input", "-", *SHORT, stdin=stdin)
    assert code == 0 and rows(out) == [{name: row[name] for name in row if name != "run"} for row in written]

    code, out, _ = command(*asked, *SHORT, "--batch-size", 1)
    sections = "".join(
        f"== {n}: {title}\n{row['completion']}\n\n"
        for n, title, row in zip((1, 2, 3), ("low", "newer wider", ""), written, strict=True)
    )
    assert code == 0 and out == sections

    (tmp_path / "prompts.txt").write_text("\ufefflow\n\n  wider\n", encoding="utf-8")
    code, out, _ = command("--input", tmp_path / "prompts.txt", *SHORT)
    assert code == 0 and out.startswith(f"== 1: low\n{written[0]['completion']}\n\n== 2: wider\n")


def test_samples_of_a_prompt_differ_and_are_numbered(command, tmp_path):
    code, out, _ = command("--prompt", "low", "--prompt", "wider", "--n", 2, "--output", tmp_path / "o", *SHORT)
    assert code == 0 and out == ""
    written = rows((tmp_path / "o").read_text())
    assert [(row["index"], row["sample"]) for row in written] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert written[0]["completion"] != written[1]["completion"]
    assert command("--prompt", "low", "--n", 2, *SHORT)[1].startswith("== 1.1: low\n")


def test_stop_string_ends_the_text_before_it(command):
    _, whole, _ = command("--prompt", "low", *SHORT)
    stop = whole[3:5]
    code, out, err = command("--prompt", "low", "--stop", stop, "--stop", "never", *SHORT)
    assert code == 0 and out == whole[: whole.index(stop)] + "\n"
    assert err.rstrip().endswith("stop")


def test_greedy_does_not_depend_on_the_seed_and_bfloat16_runs(command):
    greedy = ("--prompt", "low", "--temperature", 0, *SHORT)
    assert command(*greedy)[1] == command(*greedy, "--seed", 5)[1]
    code, _, err = command(*greedy, "--dtype", "bfloat16")
    assert code == 0 and "9 tokens" in err


def test_several_devices_make_the_same_completion_and_the_cache_may_be_int8(command, monkeypatch):
    given, made = [], []
    monkeypatch.setattr(infer.model, "load", lambda *a, **k: given.append((k["mesh"], k["capacity"])) or load(*a, **k))
    for asked in ([], ["--mesh", "tensor=2"], ["--kv-cache", "int8"]):
        code, out, err = command("--prompt", "low", *SHORT, *asked)
        assert code == 0 and err.startswith("9 tokens"), err
        made.append(out)
    assert made[0] == made[1]
    assert [(mesh.shape["tensor"], mesh.size, capacity.int8) for mesh, capacity in given] == [
        (1, 1, False), (2, 2, False), (1, 1, True)
    ]  # fmt: skip


def test_copies_share_the_prompts_of_a_file(command, tmp_path):
    file, made = tmp_path / "prompts.jsonl", []
    file.write_text("".join(json.dumps({"prompt": "low" * n}) + "\n" for n in range(1, 8)))
    for asked in ([], ["--mesh", "data=2,tensor=2"]):
        code, out, err = command("--input", file, *SHORT, "--batch-size", 2, *asked)
        assert code == 0, err
        made.append(out)
    assert made[0] == made[1] and made[0].count("\n") == 7


@pytest.mark.parametrize("asked, threshold", [(["--sparse-prefill", "64"], 64), ([], None)])
@pytest.mark.parametrize(
    "program", [["generate", "--prompt", "low", "--max-new-tokens", "1"], ["chat", "--format", "qwen2"]]
)
def test_sparse_prefill_reaches_the_engine(run_infer, long_run, monkeypatch, program, asked, threshold):
    given = []
    monkeypatch.setattr(
        infer.model, "load", lambda *a, sparse, **k: given.append(sparse) or load(*a, sparse=sparse, **k)
    )
    assert run_infer(program[0], long_run, *program[1:], *asked)[0] == 0
    assert given == [threshold and VerticalSlash(threshold=threshold)]


def test_every_place_of_the_checkpoint_may_be_named(command, run_folder):
    places = [run_folder, run_folder / "checkpoints", run_folder / "checkpoints" / "00000007"]
    assert len({command("--prompt", "low", *SHORT, model=place)[:2] for place in places}) == 1


def test_without_a_limit_the_room_in_the_model_is_one(command):
    code, _, err = command("--prompt", "l", "--temperature", 0)
    assert code == 0 and err.startswith("63 tokens") and err.endswith("length\n")


def test_interruption_keeps_what_was_made(command, tmp_path, monkeypatch):
    class Interrupted(infer.generate.Completion):
        def push(self, token):
            if self.num_tokens == 4:
                raise KeyboardInterrupt
            return super().push(token)

    _, whole, _ = command("--prompt", "low", *SHORT)
    monkeypatch.setattr(infer.generate, "Completion", Interrupted)
    code, out, err = command("--prompt", "low", *SHORT)
    assert code == 130 and len(out) > 1 and whole.startswith(out.rstrip("\n")) and "interrupted" in err
    # A file has whole completions only.
    code, _, err = command(*["--prompt", "low"] * 5, "--output", tmp_path / "o", *SHORT)
    assert code == 130 and (tmp_path / "o").read_text() == "" and "the same command makes the others" in err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "no prompt; give --prompt"),
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature=-1.0 must be"),
        (["--prompt", "a", "--temperature", "nan"], 2, "temperature=nan must be"),
        (["--prompt", "a", "--top-p", "0"], 2, "top_p=0.0 must be above 0"),
        (["--prompt", "a", "--min-p", "2"], 2, "min_p=2.0 must be"),
        (["--prompt", "a", "--top-k", "-3"], 2, "top_k=-3 must not be negative"),
        (["--prompt", "a", "--repetition-penalty", "0"], 2, "repetition_penalty=0.0 must be above 0"),
        (["--prompt", "a", "--presence-penalty", "3"], 2, "presence_penalty=3.0 must be between -2 and 2"),
        (["--prompt", "a", "--frequency-penalty", "-3"], 2, "frequency_penalty=-3.0 must be between -2 and 2"),
        (["--prompt", "a", "--stop", ""], 2, "stop string must not be empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens: 0 must be 1 or more"),
        (["--prompt", "a", "--seed", "-1"], 2, "--seed: -1 must be 0 or more"),
        (["--prompt", "a", "--seed", str(2**32)], 2, "at most 4294967295"),
        (["--prompt", "a", "--sparse-prefill", "63"], 2, "--sparse-prefill: 63 must be 64 or more"),
        (["--prompt", "a", "--mesh", "tensor=16"], 2, "--mesh tensor=16 takes 16 devices, and there are 8"),
        (["--prompt", "a", "--mesh", "tensor=3"], 2, "--mesh tensor=3: .* cannot be split so; tensor can be 1, 2, 4"),
        (["--prompt", "a", "--mesh", "expert=2"], 2, "--mesh expert=2: .* has no experts to share"),
        (["--prompt", "a", "--mesh", "fsdp=2"], 2, "'fsdp=2' in 'fsdp=2': wanted tensor=N, expert=N or data=N"),
        (["--prompt", "a", "--mesh", "data=3,tensor=4"], 2, "--mesh data=3,tensor=4 takes 12 devices, and there are 8"),
        (["--prompt", "a", "--mesh", "tensor=0"], 2, "--mesh: 'tensor=0' in 'tensor=0': wanted tensor=N"),
        (["--prompt", "a", "--n", "x"], 2, "--n: invalid integer value: 'x'"),
        (["--prompt", "a", "--temp", "1"], 2, "unrecognized arguments: --temp 1"),
        (["--prompt", "a", "--max-new-tokens", "64"], 3, "--prompt 1: .* 1 tokens and 64 new ones.*at most 63"),
        (["--prompt", "a", "--prompt", "a " * 70], 3, "--prompt 2: a prompt of .* up to 63 tokens fit"),
        (["--prompt", "a\udcff"], 3, "--prompt 1: character 2 of the prompt is not valid UTF-8"),
        (["--input", "nowhere.txt"], 4, "cannot read prompts from nowhere.txt: No such file"),
        (["--prompt", "a", "--output", "no/folder/o"], 4, "cannot write completions to no/folder/o: No such file"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_their_exit_code(command, arguments, code, message):
    got, out, err = command(*arguments)
    assert (got, out) == (code, "")
    assert err.startswith("infer: error: ") and err.count("\n") == 1
    assert re.search(message, err), err


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "standard input:2: not JSON"),
        (b'{"prompt": "a"}\n\n[1]\n', "standard input:3: the row has list"),
        (b'{"prompt": "a"}\n{"text": "b", "id": 1}\n', "standard input:2: the row has keys text, id"),
        (b'{"prompt": ["a"]}\n', "standard input:1: the prompt is list"),
        (b'{"prompt": "\\ud800"}\n', "standard input:1: character 1"),
        (b'{"prompt": ' + b"[" * 100_000, "standard input:1: not JSON"),
        (b"fine\nnot \xff\n", "standard input:2: not UTF-8"),
        (b"\n \n", "standard input has no prompts"),
        (b"", "standard input has no prompts"),
    ],
)
def test_bad_rows_are_named_by_line(command, data, message):
    code, out, err = command("--input", "-", stdin=data)
    assert (code, out) == (3, "")
    assert err.startswith(f"infer: error: {message}") and err.count("\n") == 1, err


def test_a_file_named_jsonl_is_held_to_it(command, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("just text\n")
    code, _, err = command("--input", tmp_path / "prompts.jsonl")
    assert code == 3 and "prompts.jsonl:1: not JSON" in err


def test_a_terminal_shows_the_prompt_faintly_unless_told_not_to(command, monkeypatch):
    _, plain, _ = command("--prompt", "low", *SHORT)
    monkeypatch.setattr(infer.generate.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert command("--prompt", "low", *SHORT)[1] == f"\033[2mlow\033[0m{plain}"
    monkeypatch.setenv("NO_COLOR", "1")
    assert command("--prompt", "low", *SHORT)[1] == f"low{plain}"


def test_a_reader_that_leaves_and_a_file_that_is_full_as_processes(run_folder):
    environment = {**os.environ, "XLA_FLAGS": ""}
    program = [sys.executable, "-m", "infer", "generate", str(run_folder), "--prompt", "low", *SHORT]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(program, cwd=ROOT, env=environment, **pipes) as piped:
        piped.stdout.close()
        assert piped.stderr.read() == b""
    assert piped.returncode == 0
    full = subprocess.run(
        [*program, "--output", "/dev/full"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert full.returncode == 4
    assert full.stderr == "infer: error: cannot write completions to /dev/full: No space left on device\n"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(command, tmp_path, tokenizer):
    small = save_run(tmp_path, tiny_config(num_layers=1, vocab_size=277), tokenizer)
    code, _, err = command("--prompt", "low", model=small)
    assert code == 3 and "the tokenizer has 278 tokens and the model a vocabulary of 277" in err


def test_a_published_folder_gives_what_its_run_gives(command, long_run, published):
    for options in (("--temperature", 0), ("--seed", 3)):
        outs = {command("--prompt", "low", *options, *SHORT, model=model)[1] for model in (long_run, published)}
        assert len(outs) == 1 and outs != {""}


SAMPLED = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def test_the_models_own_defaults_hold_where_nothing_is_given(command, published, tmp_path):
    sampled = variant(published, tmp_path / "sampled", generation_config_json=SAMPLED | {"max_new_tokens": 7})
    spelled = ["--temperature", 0.5, "--top-p", 0.8, "--top-k", 20, "--repetition-penalty", 1.05]
    code, out, err = command("--prompt", "low", model=sampled)
    assert (code, out) == command("--prompt", "low", *spelled, "--max-new-tokens", 7, model=published)[:2]
    assert err.splitlines()[0] == (
        "sampling: temperature 0.5, top_k 20, top_p 0.8, repetition_penalty 1.05, max_new_tokens 7 "
        "(generation_config.json)"
    )

    greedy = ["--prompt", "low", "--temperature", 0, "--repetition-penalty", 1, "--max-new-tokens", 9]
    code, out, err = command(*greedy, model=sampled)
    assert (code, out) == command(*greedy, model=published)[:2] and err.startswith("9 tokens")
    silent = variant(published, tmp_path / "silent", generation_config_json={})
    code, out, err = command(*greedy[:2], *greedy[4:], model=silent)
    assert (code, out) == command(*greedy, model=published)[:2]
    assert err.startswith("sampling: temperature 0 (generation_config.json)\n")


def test_a_completion_ends_at_the_models_own_stop_tokens(command, published, tmp_path):
    greedy = ["--prompt", "low", "--temperature", 0, *SHORT]
    assert command(*greedy, model=published)[2].endswith("; length\n")
    every = variant(published, tmp_path / "every", generation_config_json={"eos_token_id": list(range(278))})
    code, out, err = command(*greedy, model=every)
    assert (code, out) == (0, "\n") and err.startswith("1 tokens in") and err.endswith("; stop\n")


CHATS = [
    {"messages": [{"role": "user", "content": "low"}]},
    {"messages": [{"role": "system", "content": "newer"}, {"role": "user", "content": "low"}], "id": 7},
]


def test_chats_are_rendered_in_the_models_format_and_mix_with_prompts(command, published, tmp_path, tokenizer):
    folder = variant(published, tmp_path / "chat", chat_template_jinja=TEMPLATE)
    text = "<|im_start|>user\nlow<|im_end|>\n<|im_start|>assistant\n"
    stdin = "\n".join(json.dumps(row) for row in [*CHATS, {"prompt": text}]).encode()
    code, out, err = command("--input", "-", "--control-tokens", *SHORT, model=folder, stdin=stdin)
    assert code == 0 and "not a known one" in err
    plain, with_system, spelled = rows(out)
    assert plain["messages"] == CHATS[0]["messages"] and "prompt" not in plain and spelled["prompt"] == text
    assert plain["prompt_tokens"] == spelled["prompt_tokens"] == len(tokenizer.encode_trusted(text))
    assert with_system["prompt_tokens"] > plain["prompt_tokens"]

    code, out, err = command("--input", "-", "--format", "qwen2.5", *SHORT, model=folder, stdin=stdin)
    assert code == 0 and "not a known one" not in err
    assert rows(out)[0]["prompt_tokens"] > plain["prompt_tokens"]  # its default system message
    assert rows(out)[2]["prompt_tokens"] == len(tokenizer.encode(text))
    assert "standard input:3: <|im_start|> is taken for plain text; --control-tokens" in err


def test_control_tokens_in_prompts_are_text_unless_asked_for(command):
    prompt = "<|im_start|>low"
    code, _, err = command("--prompt", prompt, *SHORT)
    assert code == 0 and "warning: --prompt 1: <|im_start|> is taken for plain text; --control-tokens" in err
    code, _, err = command("--prompt", prompt, "--control-tokens", *SHORT)
    assert code == 0 and "warning" not in err


@pytest.mark.parametrize(
    "row, arguments, code, message",
    [
        (CHATS[0], [], 2, "has no chat template; choose a format with --format: qwen1, "),
        ({"prompt": "low"}, ["--format", "qwen2"], 2, "--format and --no-thinking are for rows with messages"),
        (CHATS[0], ["--format", "qwen9"], 2, "invalid choice: 'qwen9'"),
        (CHATS[0], ["--format", "qwen2", "--no-thinking"], 2, "chat format qwen2 has no thoughts"),
        ({"messages": []}, ["--format", "qwen2"], 3, "standard input:1: messages is empty"),
        ({"messages": [{"role": "user"}]}, ["--format", "qwen2"], 3, r"input:1: messages\[0\].content is missing"),
        ({"messages": "low", "prompt": "low"}, ["--format", "qwen2"], 3, "the row has keys messages, prompt"),
        (
            {"messages": [*CHATS[0]["messages"], {"role": "assistant", "content": "er"}]},
            ["--format", "qwen2"], 3, "standard input:1: the last message is the assistant's",
        ),
        (CHATS[0] | {"tools": [{"name": "f"}]}, ["--format", "qwen2"], 3, "standard input:1: .*tools"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ["--format", "qwen2"], 3, "standard input:1: "),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_rendered_get_one_line(command, published, row, arguments, code, message):
    got, out, err = command("--input", "-", *arguments, model=published, stdin=json.dumps(row).encode())
    assert (got, out) == (code, "")
    assert err.startswith("infer: error: ") and err.count("\n") == 1
    assert re.search(message, err), err
