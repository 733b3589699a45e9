"""The command cifar-fast: one module per subcommand, and the flags that they share."""
