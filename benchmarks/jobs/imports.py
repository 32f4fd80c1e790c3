"""`import trl` and nothing else; the time of the interpreter itself is not in it."""

import json
import sys
import time

began = time.process_time(), time.perf_counter()
import trl  # noqa: E402, F401

measured = {"steps": 1, "step_cpu": time.process_time() - began[0], "step_wall": time.perf_counter() - began[1]}
with open(sys.argv[2], "w") as file:
    json.dump({"gate": {}, **measured}, file)
