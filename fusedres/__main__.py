"""``python -m fusedres``: the `fusedres` command."""

import sys

from fusedres.commands.main import main

sys.exit(main())
