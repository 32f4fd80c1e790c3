"""`python -m trl.scripts.grpo`: as `trl grpo`."""

from trl.scripts.training import run_script

if __name__ == "__main__":
    run_script("grpo")
