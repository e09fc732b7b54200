"""What times and errors are measured by: clocks that take turns, and the rule for what may be wrong."""
