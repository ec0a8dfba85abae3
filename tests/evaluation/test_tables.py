"""Tables on a console; their Markdown is tested with the report."""

import io

from rich.console import Console

from megatron_iml.evaluation.tables import Table, to_rich

TABLE = Table("Levels", ("level", "score"), 1, (("fully held out", "50.0"), ("all [red]levels", "7.5")))


def test_console_shows_cells_literally_and_aligns_numbers_right() -> None:
    screen = io.StringIO()
    Console(file=screen, width=60).print(to_rich(TABLE))
    lines = [line.strip("│┃ ") for line in screen.getvalue().splitlines()]
    [held_out] = [line for line in lines if line.startswith("fully held out")]
    [everything] = [line for line in lines if line.startswith("all [red]levels")]
    assert held_out.index(".") == everything.index(".")
