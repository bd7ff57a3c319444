"""
A condition, receivers and a log handler that hang, each on a server of its own (SCENE_HANGS says which it is).

On each, a run of several leases that is none of their business is beside them.
"""
