# ruff: noqa: D301 - click keeps the lines of a paragraph that starts with a backspace character
"""`axolotl layersel score | show | compare | cache | recipe`, and the same as `python -m axolotl_layersel`.

Results go to standard output, everything else to standard error, axolotl's log included. Exit status: 0 done, 1 the
config, model, data or plan does not allow it, 2 wrong usage. `show` and `recipe` import neither torch nor axolotl.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

CONFIG = click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
PLAN = click.argument("plan", type=click.Path(exists=True, path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
OVERRIDES = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the config, for example layersel.coverage=0.9. May be given several times.",
)


@click.group(short_help="choose which decoder layers to fine-tune")
def main() -> None:
    """Choose which decoder layers to fine-tune.

    \b
    axolotl layersel score config.yml            find the layers, write the plan, train nothing
    axolotl layersel show outputs/run            look at the plan of a run
    axolotl layersel compare config.yml          what every method would choose
    axolotl layersel recipe outputs/run config.yml -o share.yml
    axolotl layersel cache config.yml            compute the frozen layers once for all runs

    Commands that print JSON are best run as `python -m axolotl_layersel`, because `axolotl` prints its logo first.
    """


@main.command()
@CONFIG
@OVERRIDES
@AS_JSON
def score(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score the layers of CONFIG's model on its training set and write the plan; train nothing.

    The plan, its report and recipe.yml are written to OUTPUT_DIR/layersel/, as by a training run. The table goes to
    the log, the path of the plan to standard output. A `first_layer:` or `plan:` in CONFIG is left aside, and so are
    FSDP, DeepSpeed and other ways to split a model: one process scores for all of them.

    \b
    axolotl layersel score config.yml
    axolotl layersel score config.yml --set layersel.coverage=0.9
    python -m axolotl_layersel score config.yml --json | jq .first_trainable
    """
    with _one_paragraph_errors(), _only_results_on_stdout():
        from axolotl_layersel.integration import commands

        plan, path = commands.score(config, commands.parse_overrides(overrides))
    click.echo(plan.to_json() if as_json else str(path), nl=not as_json)


@main.command()
@PLAN
@AS_JSON
def show(plan: Path, as_json: bool) -> None:
    """Print a plan: what each layer scored, the cut, and what it is predicted to save.

    PLAN is a plan.json, or the folder of a run or checkpoint that holds one.

    \b
    axolotl layersel show outputs/run
    python -m axolotl_layersel show outputs/run/checkpoint-500 --json | jq .trainable_layers
    """
    with _one_paragraph_errors():
        from axolotl_layersel.plan import PLAN_FILE, PLAN_FOLDER, read_plan
        from axolotl_layersel.report.table import table

        values = read_plan(plan)
        if as_json:
            click.echo(values.to_json(), nl=False)
            return
        _print(table(values))
        folder = plan if plan.is_dir() else plan.parent
        folder = folder if (folder / PLAN_FILE).exists() else folder / PLAN_FOLDER
        beside = [folder / name for name in ("report.html", "deviation.png", "recipe.yml") if (folder / name).exists()]
        if beside:
            click.echo("\nsee also " + ", ".join(str(path) for path in beside))


@main.command()
@CONFIG
@OVERRIDES
@AS_JSON
def compare(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what every method would choose for CONFIG's model on the same rows; write nothing.

    Ours with each deviation and gain; gradient norm and relative gradient norm, weight SNR as Spectrum takes it, block
    influence, CKA; random, uniform and fixed shares of the layers. All weights go through the policy of CONFIG. The
    first row is the choice of a run with CONFIG; overlap and rank correlation are with that one.

    \b
    axolotl layersel compare config.yml
    python -m axolotl_layersel compare config.yml --json > methods.json
    """
    with _one_paragraph_errors(), _only_results_on_stdout():
        from axolotl_layersel.compare.methods import table
        from axolotl_layersel.integration import commands

        choices, about = commands.compare(config, commands.parse_overrides(overrides))
    if as_json:
        click.echo(json.dumps({**about, "methods": [asdict(choice) for choice in choices]}, indent=2))
        return
    _print(table(choices, num_layers=about["num_layers"]))
    for choice in choices:
        if choice.skipped:
            click.echo(f"{choice.method} was skipped: {choice.skipped}")


@main.command()
@CONFIG
@OVERRIDES
@click.option("--info", is_flag=True, help="Show the caches that runs with CONFIG look into; compute nothing.")
@click.option("--clear", is_flag=True, help="Remove them.")
@AS_JSON
def cache(config: Path, overrides: tuple[str, ...], info: bool, clear: bool, as_json: bool) -> None:
    """Compute the frozen layers of CONFIG's model on its data once, for all later runs; train nothing.

    Runs with `layersel: {prefix_cache: disk}` (or `auto`), the same model, cut and precision then start at once,
    whatever their learning rate is.

    \b
    axolotl layersel cache config.yml
    axolotl layersel cache config.yml --info
    axolotl layersel cache config.yml --clear
    """
    if info and clear:
        raise click.UsageError("--info shows and --clear removes: give one of them.")
    with _one_paragraph_errors(), _only_results_on_stdout():
        from axolotl_layersel.integration import commands

        values = commands.parse_overrides(overrides)
        if info or clear:
            found = commands.find_caches(config, values, remove=clear)
        else:
            found = [commands.fill_cache(config, values)]
    if as_json:
        click.echo(json.dumps([one.as_json() for one in found], indent=2))
        return
    for one in found:
        done = "removed: " if clear else ""
        click.echo(
            f"{done}{one.path}: {one.about.get('base_model', 'unknown model')}, cut {one.about.get('cut', 'unknown')}, "
            f"{one.samples} samples, {one.tokens} tokens, {one.bytes / 1e9:.3g} GB"
        )
    if not found:
        click.echo("no cache")


@main.command()
@PLAN
@CONFIG
@click.option("--plain", is_flag=True, help="For stock axolotl: the same layers, without the plugin and its saving.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
def recipe(plan: Path, config: Path, plain: bool, output: Path | None) -> None:
    """Write CONFIG with the choice of PLAN in it, to share and to run without scoring.

    \b
    axolotl layersel recipe outputs/run config.yml -o share.yml
    axolotl layersel recipe outputs/run config.yml --plain -o stock.yml
    """
    with _one_paragraph_errors():
        from axolotl_layersel.plan import read_plan, write_text
        from axolotl_layersel.report.recipe import read_config, recipe_text

        text = recipe_text(read_config(config), read_plan(plan), plain=plain)
        if output is None:
            click.echo(text, nl=False)
        else:
            write_text(output, text)
            click.echo(str(output))


def _print(renderable: RenderableType) -> None:
    """On a terminal with its colours and width; elsewhere plain, 100 columns, without blanks at line ends."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(file=sys.stdout).print(renderable)
        return
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def _only_results_on_stdout() -> Iterator[None]:
    """Send what axolotl and its libraries print to standard error, down to the file descriptor."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextmanager
def _one_paragraph_errors() -> Iterator[None]:
    """Turn an error that a user can act on into one paragraph on standard error and exit status 1.

    Other errors are bugs of ours and keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        click.echo(f"Error: {_paragraph(error)}", err=True)
        sys.exit(1)


def _paragraph(error: Exception) -> str:
    parts: Any = error.errors() if hasattr(error, "errors") and callable(error.errors) else None
    if parts:  # pydantic: the places and messages, without its own framing
        text = "; ".join(
            ": ".join(filter(None, (".".join(str(p) for p in part.get("loc", ())), str(part.get("msg", "")))))
            for part in parts
        )
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
