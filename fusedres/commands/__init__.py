"""What the subcommands of `fusedres` do, one file for each; `fusedres_cli` has their arguments."""
