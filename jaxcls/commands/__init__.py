"""The subcommands of the command line: each is one call into the API, its flags a dataclass."""
