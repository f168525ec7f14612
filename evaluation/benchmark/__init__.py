"""Speed and memory of this implementation against a standard one."""
