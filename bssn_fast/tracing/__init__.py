"""The same for torch.compile, torch.export and torch.jit.trace, which record what runs instead of running it.

May import `calls` and all that it may import; knows layers by what `calls.member.Member` says of them.
"""
