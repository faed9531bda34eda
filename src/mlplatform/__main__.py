"""Run a command: `python -m mlplatform COMMAND`."""

import sys

from mlplatform.cli import main

sys.exit(main())
