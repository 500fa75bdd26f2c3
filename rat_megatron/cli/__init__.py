"""The command line `rat-megatron`: functions elsewhere in the package, whose signatures are the options of the commands."""
