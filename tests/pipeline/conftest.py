"""Lets worker processes import worker_tasks.py: they get this process's path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
