"""The user's own model as a workload: any nn.Module with LSTMs in it, called with the user's own inputs.

Everything here runs in a worker, for it runs the user's code. It may use models, variants and execution, and nothing of
`bench`. A refusal is an `OwnModelError` with one line: what was found, what was expected, what to do.
"""
