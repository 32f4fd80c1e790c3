"""Release 1.x, documentation: command line.

Rows: none.
"""

import runpy
import sys

import tiny

tiny.shell("trl --version")
tiny.shell("trl env")
sys.argv = ["trl", "env"]
runpy.run_module("trl", run_name="__main__")
