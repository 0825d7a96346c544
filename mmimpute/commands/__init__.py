"""Groups of commands; `mmimpute.cli` puts them together."""
