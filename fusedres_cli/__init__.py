"""What the `fusedres` command takes: its subcommands and their options. The bodies lie in `fusedres.commands`.

A package beside ``fusedres``, since importing that one imports PyTorch: help, completion, and what is asked wrongly are
answered without. It imports the standard library alone.
"""
