"""Run a command: `python -m mlplatform_ops COMMAND`."""

import sys

from mlplatform_ops.cli import main

sys.exit(main())
