"""The tools of the command line, a file each: their arguments, and what they print."""
