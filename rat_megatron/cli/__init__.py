"""The command line `rat-megatron`: thin commands, each of which calls one function elsewhere in the package."""
