"""``python -m fusedres``: the `fusedres` command."""

import sys

from fusedres_cli.main import main

sys.exit(main())
