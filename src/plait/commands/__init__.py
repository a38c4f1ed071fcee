"""What each command of `plait` does, as a function; the command line parses and calls one of these."""
