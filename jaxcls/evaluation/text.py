"""Text for terminals, measured in the columns that it takes there."""

import unicodedata


def shorten(name: str, max_width: int) -> str:
    """`name` on one line, its middle left out where it is longer than `max_width` terminal columns."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    if _columns(name) <= max_width:
        return name
    middle = len(name) // 2
    head, tail = name[:middle], name[middle:]
    while _columns(head) + 1 + _columns(tail) > max_width:
        head, tail = (head[:-1], tail) if len(head) > len(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def format_table(rows: list[list[str]]) -> str:
    """Columns two spaces apart: the first flush left, the others flush right."""
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + gaps[0], *(gap + cell for cell, gap in zip(row[1:], gaps[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _columns(text: str) -> int:
    """Terminal columns that a text takes: two for a wide East Asian character, none for a combining one."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
