"""`python -m qwen2.cli`, the same as `qwen2`."""

from qwen2.cli.main import main

main()
