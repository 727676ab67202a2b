"""The tour as a notebook, a cell for each step. Development only: it needs nbformat.

    python -m docs.notebook          # writes docs/tour.ipynb, which needs requirements.txt alone
"""
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from files.layouts import HERE
from nano.page import steps_of

FILE = Path(__file__).with_name("tour.ipynb")
START = """import os, sys
os.chdir("..") if not os.path.exists("tour.py") else None  # the repository's root
sys.path.insert(0, os.getcwd())
"""


def main():
    before, steps = steps_of(HERE / "tour.py")
    _, summary, code = before.split('"""', 2)
    summary, *_ = summary.splitlines()
    cells = [new_markdown_cell(f"# The tour\n\n{summary}"), new_code_cell(START + code.strip())]
    for title, text, code in steps:
        cells += [new_markdown_cell(f"## {title}\n\n{text}"), new_code_cell(code)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # nbformat's own would differ each time
    nbformat.write(new_notebook(cells=cells), FILE)
    print(FILE)


if __name__ == "__main__":
    main()
