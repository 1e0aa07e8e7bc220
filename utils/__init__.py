"""What the command-line scripts share; the library never imports this."""
