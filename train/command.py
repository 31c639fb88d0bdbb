"""What the commands that read a config have in common: its options, and how they become the config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

from qwen_jax import bindings
from qwen_jax.command import Parser

T = TypeVar("T")


class ConfigParser(Parser):
    """The parser of `python -m PROGRAM CONFIG.gin --set PATH=VALUE`."""

    def __init__(self, program: str, *, description: str | None, epilog: str, config: str) -> None:
        """`config` says what the file is for; description and epilog are shown as they are."""
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("config", metavar="CONFIG.gin", type=Path, help=config)
        self.add_argument(
            "--set",
            metavar="PATH=VALUE",
            nargs="+",
            action="extend",
            default=[],
            help="bind config fields, after the file",
        )

    def add_print(self) -> None:
        """Adds the option that shows the config and no more."""
        self.add_argument("--print", action="store_true", help="show the resolved config and where each value is from")


def resolve(schema: type[T], options: argparse.Namespace) -> tuple[T, dict[str, str]]:
    """The config that the options name, and where each bound path got its value."""
    return bindings.resolve(schema, [*bindings.read(options.config), *bindings.parse_set(options.set)])
