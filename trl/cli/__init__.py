"""The `trl` command."""
