"""`python -m trl.scripts.rloo`: as `trl rloo`."""

from trl.scripts.training import run_script

if __name__ == "__main__":
    run_script("rloo")
