"""`python -m peft_moe_qlora` is the command line."""

import sys

from .cli import main

sys.exit(main())
