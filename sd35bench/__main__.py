"""`python -m sd35bench` is the `sd35bench` command."""

import sys

from sd35bench.cli import main

sys.exit(main())
