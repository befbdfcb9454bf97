"""Weights of other frameworks: files read without executing code, names and conventions translated to ours."""
