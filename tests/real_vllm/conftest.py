"""Tests with a real vLLM. `make test-vllm` runs them where it is installed; elsewhere they are not collected."""

from trl.import_utils import is_installed

collect_ignore_glob = [] if is_installed("vllm") else ["*"]
