"""The subcommands of `dinat-triton`, a module each: `configure(parser)` declares arguments, `run(args)` works."""
