"""`trl --help` as a user types it."""

import json
import os
import subprocess
import sys
import time

command = [os.path.join(os.path.dirname(sys.executable), "trl"), "--help"]
if not os.path.exists(command[0]):
    command = [sys.executable, "-m", "trl.cli.main", "--help"]
before, began = os.times(), time.perf_counter()
subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
after = os.times()
cpu = after.children_user + after.children_system - before.children_user - before.children_system
with open(sys.argv[2], "w") as file:
    json.dump({"gate": {}, "steps": 1, "step_cpu": cpu, "step_wall": time.perf_counter() - began}, file)
