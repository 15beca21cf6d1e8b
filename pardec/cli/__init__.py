"""The command line: `pardec generate`, `chat`, `check`, `tune`, `export`, `import` and `push`.

Exit codes: 0 done, 1 a check found a difference that is no tie of the dtype, 2 unusable input, 130 Ctrl-C.
"""
