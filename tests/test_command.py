"""What every command line shares."""

from __future__ import annotations

from qwen_jax.command import run_command
from qwen_jax.errors import ModelError


def test_a_message_is_one_line_that_a_terminal_cannot_obey(capsys):
    def main():
        raise ModelError("tensor \x1b[31mred\r\nNEW LINE\u202e has “quotes” and 词")

    assert run_command("convert", main) == 3
    assert capsys.readouterr().err == ("convert: error: tensor \\x1b[31mred\\r\\nNEW LINE\\u202e has “quotes” and 词\n")
