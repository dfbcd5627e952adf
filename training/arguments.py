"""From a YAML file and the command line to a Recipe.

A plain ``argparse`` parser is built from the fields of Recipe, their types and the strings under them, so
that ``--help`` is grouped, complete and immediate. Precedence: command line, then the file, then defaults.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from recipe import Recipe, check_keys, check_renamed

DESCRIPTION = """\
Finetune a pretrained causal language model for activation sparsity: substitute the activation of its MLP
blocks, train it on plain text (optionally with a progressive L1 penalty), measure it, and save it."""

EPILOG = """\
examples:
  python training/finetune.py --config training/recipes/relu.yaml --model ./my-model --dataset ./my-texts
  accelerate launch --num_processes 8 training/finetune.py --config training/recipes/prosparse.yaml
  accelerate launch training/finetune.py --config training/recipes/relu.yaml --learning-rate 1e-4 --resume
  python training/finetune.py --config training/recipes/prosparse.yaml --methods.l1.scale 0.3
  python training/finetune.py --patch '{activation: {name: fatrelu, threshold: 0.1}}' --model ./my-model

docs/training.md tells the rest."""


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """The recipe of a command line (without the program's name; None reads ``sys.argv``).

    Ends the program with a message and status 2 on a mistake, as argparse does.
    """
    parser = build_parser()
    try:
        line, inner = _inner_fields(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        parser.error(str(error))
    arguments, rest = parser.parse_known_args([_with_dashes(argument) for argument in line])
    given = {k: v for k, v in vars(arguments).items() if v is not MISSING}
    config = given.pop("config", None)
    try:
        check_renamed([a.partition("=")[0][2:].replace("-", "_") for a in rest if a.startswith("--")], "--")
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        values = {**(load_yaml(config) if config else {}), **given}
        for path, value in inner:
            values[path[0]] = _with_inner(values.get(path[0]), path, value)
        return Recipe(**values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The fields set in a recipe file.

    Raises:
        ValueError: the file is not a mapping of known fields, or is not YAML.
        OSError: it cannot be read.

    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines of the form `field: value`.")
    check_keys(values, str(path))
    return values


def build_parser() -> argparse.ArgumentParser:
    """The parser of finetune.py: one option per field of Recipe, and ``--config``."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        usage="finetune.py [--config FILE] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=MISSING,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML recipe with any of the fields below; options given here override it",
    )
    hints = typing.get_type_hints(Recipe)
    documentation, headings = _field_documentation()
    group: Any = parser
    for f in fields(Recipe):
        if f.name in headings:
            group = parser.add_argument_group(headings[f.name])
        default = getattr(Recipe(), f.name)
        text = f"{documentation[f.name]} Default: {_shown(default)}".replace("%", "%%")
        group.add_argument(_with_dashes(f"--{f.name}"), help=text, **_option(f.name, hints[f.name]))
    return parser


def _with_dashes(argument: str) -> str:
    """An option, with dashes in its name; underscores, as in YAML, are as good. Values stay as they are."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument


def _option(name: str, hint: Any) -> dict[str, Any]:
    """Argparse keywords for a field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is dict or any(typing.get_origin(one) is dict for one in arguments):
        return {"type": _flow, "metavar": "CONFIG"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": arguments}
    if origin is list:
        return {"nargs": "*", "type": arguments[0], "metavar": "X"}
    if origin is types.UnionType:
        return {"type": lambda text: None if text.lower() == "none" else text, "metavar": "TEXT"}
    return {"type": hint, "metavar": {str: "TEXT", int: "N", float: "X"}[hint]}


def _inner_fields(line: Sequence[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """The options without those of the form ``--methods.l1.scale 0.3``; these as paths and values.

    Raises:
        ValueError: one of these has no value.

    """
    rest: list[str] = []
    inner: list[tuple[list[str], Any]] = []
    arguments = iter(line)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not re.fullmatch(r"--[A-Za-z_-]+(\.\w+)+", name):
            rest.append(argument)
            continue
        if not equals and (text := next(arguments, "--")).startswith("--"):
            raise ValueError(f"argument {name}: expected one value")
        try:
            inner.append((name[2:].replace("-", "_").split("."), _flow(text)))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"argument {name}: {error}") from None
    return rest, inner


def _with_inner(value: Any, path: Sequence[str], new: Any) -> Any:
    """``value`` with ``new`` at a path of which the first name is its own."""
    if len(path) == 1:
        return new
    if isinstance(value, str):  # the short form of a mapping with a name
        value = {"activation": value} if path[0] == "patch" else {"name": value}
    if not isinstance(value, dict | None):
        raise ValueError(f"{path[0]}={value!r} is no mapping, so {'.'.join(path)} cannot be set.")
    inner = dict(value or {})
    return {**inner, path[1]: _with_inner(inner.get(path[1]), path[1:], new)}


def _flow(text: str) -> Any:
    """A name, or a mapping in YAML's one-line form."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a name nor a mapping such as '{{activation: {{name: fatrelu, threshold: "
            f"0.1}}}}': {problem}"
        ) from None


def _shown(default: Any) -> str:
    """A default as it is typed on the command line."""
    if default is None or default in ([], {}):
        return "none" if default is None else "empty"
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _field_documentation() -> tuple[dict[str, str], dict[str, str]]:
    """The string under each field of Recipe, and the headings ("# ---- name") before groups of fields."""
    source = inspect.getsource(Recipe)
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    lines = source.splitlines()
    documentation, headings = {}, {}
    for statement, following in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        documentation[name] = " ".join(following.value.value.split())
        if heading := re.match(r"\s*# ---- (.+)", lines[statement.lineno - 2]):
            headings[name] = heading[1]
    return documentation, headings


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, which YAML 1.1 takes for text."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
