"""Speed and memory beside the method: each file is proven equal to its plain twin in `unilip.method`, bit or rounding.

Nothing here changes a network: functions run its weights in another order, or keep them elsewhere for a while.
"""
