"""How fast jaxcls is, next to what a user would pick instead and to what the machine allows.

One module per question, each `python -m benchmarks.NAME`; see the README's "Benchmarks".
"""
