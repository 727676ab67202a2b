"""The tour as a notebook, a cell for each step, by nbformat, which only whoever makes it needs.

    python -m docs.notebook          # writes docs/tour.ipynb, which needs requirements.txt alone
"""
import inspect
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import tour

FILE = Path(__file__).with_name("tour.ipynb")
START = """import os, sys
os.chdir("..") if not os.path.exists("tour.py") else None  # the repository's root
sys.path.insert(0, os.getcwd())
from tour import *
from IPython.display import Image

tour = Tour("out", fast=False)"""


def main():
    summary = inspect.getdoc(tour).split("\n\n")[0]
    cells = [new_markdown_cell(f"# The tour\n\n{summary}"), new_code_cell(START)]
    for number, step in enumerate(tour.STEPS, 1):
        title, _, text = inspect.getdoc(step).partition("\n\n")
        source = inspect.getsource(step)
        code = source[source.index('"""', source.index('"""') + 3) + 3:].strip("\n")
        cells.append(new_markdown_cell(f"## {number}. {title}\n\n{text}"))
        cells.append(new_code_cell(f"tour.start({number})\n{inspect.cleandoc(code)}\n"
                                   "Image(tour.file)"))
    notebook = new_notebook(cells=cells)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # or it would be another one every time
    nbformat.write(notebook, FILE)
    print(FILE)


if __name__ == "__main__":
    main()
