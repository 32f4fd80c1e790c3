"""`python -m trl.scripts.kto`: as `trl kto`."""

from trl.scripts.training import run_script

if __name__ == "__main__":
    run_script("kto")
