"""`python -m trl.scripts.dpo`: as `trl dpo`."""

from trl.scripts.training import run_script

if __name__ == "__main__":
    run_script("dpo")
