"""`python -m dinat_triton`: the command line."""

import sys

from dinat_triton.cli import main

sys.exit(main())
