"""`python -m trl.scripts.sft`: as `trl sft`."""

from trl.scripts.training import run_script

if __name__ == "__main__":
    run_script("sft")
