"""Tables on a terminal, or in a file without edges to fold at."""


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print rows under a head; columns of numbers stand to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for i, cell in enumerate(head):
        table.add_column(cell, justify="right" if i and rows and rows[0][i].isdigit() else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
