"""What can run a program, one file each; see `fewshot_rt.export.engine.Engine`."""
