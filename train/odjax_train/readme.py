"""Writes the table of methods into README.md, from the registry: `python -m odjax_train.readme README.md`."""

import sys
from pathlib import Path

from odjax.registry import methods_table_markdown
from odjax_train.errors import UserError
from odjax_train.run_folder import write_text

_BEGIN, _END = "<!-- methods -->\n", "<!-- /methods -->"


def with_table(text: str) -> str:
    """The text with the table between its two marks.

    Raises:
        UserError: when the marks are not there.
    """
    before, found, rest = text.partition(_BEGIN)
    _, closed, after = rest.partition(_END)
    if not found or not closed:
        raise UserError(f"the text has no {_BEGIN.strip()} ... {_END}")
    return f"{before}{_BEGIN}{methods_table_markdown().strip()}\n{_END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_text(path, with_table(path.read_text()))
