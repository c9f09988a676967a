"""What the documentation shows runs, and prints what it says."""

import pathlib
import re

import jax

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "privacy.md"


def test_the_programs_of_the_page_run_and_print_what_they_say(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    said = re.search(r"# (epsilon 2.*) of \.\.\.", code).group(1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, names := {})
    assert capsys.readouterr().out.startswith(said)
    assert names["release"]["w"].shape == names["grads"].shape == (3,)


def test_the_tables_of_the_page_are_what_the_accountants_say():
    from odjax.privacy import epsilon_of

    rows = re.findall(
        r"^\| ([\d.e-]+), ([\d.]+), (\d+), ([\d.e-]+) \|(.*)\|$", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) == 7
    for z, q, rounds, delta, cells in rows:
        _, rdp, moments = (float(cell) for cell in cells.split("|"))
        setting = (float(z), float(q), int(rounds), float(delta))
        assert abs(epsilon_of(*setting, "rdp") - rdp) < 1e-4
        assert abs(epsilon_of(*setting, "moments") - moments) < 1e-4
