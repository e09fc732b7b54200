"""The `fusedres` command, one file per subcommand."""
