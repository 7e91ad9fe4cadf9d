"""Runs the command line with `python -m peft_moe_qlora`."""

import sys

from .cli import main

sys.exit(main())
