"""The `fanformer` command: one module a verb, each imported only when its verb is called."""
