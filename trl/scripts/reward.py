"""`python -m trl.scripts.reward`: as `trl reward`."""

from trl.scripts.training import run_script

if __name__ == "__main__":
    run_script("reward")
